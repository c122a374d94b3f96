"""limbeck assets: prepare the embedded teacher and text, small teachers, and offline benchmarks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli.completion import complete_choices, complete_teachers
from limbeck.cli.options import Quiet
from limbeck.cli.verbs import verb
from limbeck.core.console import output


@verb("limbeck assets", "limbeck assets --teacher small --plan", "limbeck assets --pack benchmarks")
def assets(
    tier: Annotated[
        str,
        typer.Option(
            help="The text: quick (3.5 M tokens), pypi (19.6 M); for evaluation held-out-wikipedia, haystack.",
            autocompletion=complete_choices(("quick", "pypi", "held-out-wikipedia", "haystack")),
        ),
    ] = "quick",
    pack: Annotated[
        list[str] | None,
        typer.Option(metavar="PACK", help="Download this pack of benchmarks and nothing else; can be repeated."),
    ] = None,
    teacher: Annotated[
        str,
        typer.Option(
            help="embedded; small (trained here, under an hour); tiny (two minutes); or a YAML file.",
            autocompletion=complete_teachers,
        ),
    ] = "embedded",
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be prepared and its cost, then exit.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check the sha256 of every file again.")] = False,
    quiet: Quiet = False,
) -> None:
    """Prepare the embedded teacher and text, or benchmark packs.

    They are put into the cache; what is cached stays as it is.
    """
    # late, for a fast --help
    from limbeck.data.offline import embedded, packs
    from limbeck.data.offline.corpus import check_tier

    check_tier(tier)
    if plan:
        _print_plan(tier, teacher, pack)
        return
    if pack:
        for one in [packs.get_pack(name) for name in pack]:
            output.print(f"pack {one.name}: {packs.ensure_pack(one, verify=verify)}", soft_wrap=True)
        return
    output.print(f"teacher: {_prepare_teacher(teacher, verify)}", soft_wrap=True)
    output.print(f"text: {embedded.ensure_embedded_corpus(tier, verify=verify)}", soft_wrap=True)
    for one in map(packs.get_pack, packs.PACK_MODULES):
        cached = packs.load_pack_manifest(one)
        state = packs.ensure_pack(one, verify=verify) if cached else f"not downloaded; {one.command}"
        output.print(f"pack {one.name}: {state}", soft_wrap=True)


def _prepare_teacher(name: str, verify: bool = False) -> Path:
    # late, for a fast --help
    from limbeck.data.offline.embedded import ensure_embedded_teacher

    if name == "embedded":
        return ensure_embedded_teacher(verify=verify)
    # late: training is needed for other teachers only
    from limbeck.training.pretraining import train_or_load_teacher

    return train_or_load_teacher(name, verify=verify)


def _print_plan(tier: str, teacher: str, names: list[str] | None) -> None:
    """Print which assets are cached, and what the others would cost."""
    # late, for a fast --help
    from limbeck.core.cache import NotCachedError, cache_dry_run
    from limbeck.data.offline import embedded, packs

    assets: dict[str, Callable[[], Path]] = {}
    if not names:
        assets["teacher"] = partial(_prepare_teacher, teacher)
        assets["text"] = partial(embedded.ensure_embedded_corpus, tier)
    for pack in map(packs.get_pack, names or ()):
        assets[f"pack {pack.name}"] = partial(packs.ensure_pack, pack)
    with cache_dry_run():
        for name, prepare in assets.items():
            try:
                output.print(f"{name}: {prepare()}", soft_wrap=True)
            except NotCachedError as missing:
                output.print(f"{name}: would be prepared: {missing}", soft_wrap=True)
