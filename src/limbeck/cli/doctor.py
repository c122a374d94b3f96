"""limbeck doctor: what is installed, what is missing, and how to get it."""

import platform
import shutil
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from limbeck.cli.options import Json, Quiet
from limbeck.cli.results import print_json
from limbeck.cli.verbs import verb
from limbeck.core.console import output, progress
from limbeck.core.extras import PURPOSES, list_extras

LIBRARIES = ("torch", "transformers", "safetensors", "pydantic", "rich", "typer")


@verb("limbeck doctor", "limbeck doctor --kernels", "limbeck doctor --json")
def doctor(
    check_kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Compare every kernel with torch on this GPU (takes minutes the first time)."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what is installed, what is missing, and how to get it.

    Versions, extras, threads, devices, kernels, assets and free disk space.
    """
    extras = [
        {"name": one.name, "purpose": PURPOSES[one.name], "packages": one.packages, "missing": one.missing}
        | {"command": one.command}
        for one in list_extras()
    ]
    kernels = [dict(zip(("name", "state", "note"), row)) for row in _list_kernels(check_kernels)]
    document: dict[str, Any] = {
        "versions": _find_versions(),
        "extras": extras,
        **_inspect_machine(),
        "kernels": kernels,
    }
    document |= _inspect_cache()
    if as_json:
        print_json(document)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in _list_rows(document):
        table.add_row(*row)
    output.print(table)


def _list_rows(document: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """List what is known as rows of three cells: what, its state, and a remark."""
    for name, version in document["versions"].items():
        yield name, version, ""
    for extra in document["extras"]:
        missing = ", ".join(extra["missing"])
        remark = f"{extra['purpose']}: {extra['command']}" if missing else extra["purpose"]
        yield f"extra {extra['name']}", f"missing: {missing}" if missing else "installed", remark
    yield "device", document["device"], "" if document["cuda"] else "no CUDA device found"
    yield "threads", str(document["threads"]), "set OMP_NUM_THREADS=1 if another process is busy"
    yield "matrix products", f"{document['flops_per_second'] / 1e9:.0f} GFLOP/s", ""
    for one in document["kernels"]:
        yield one["name"], one["state"], one["note"]
    for one in document["assets"]:
        size = f"{one['bytes'] / 1e6:.0f} MB" if one["folder"] else "not downloaded"
        yield one["name"], size, one["folder"] or one["command"]
    yield "free disk", f"{document['free_bytes'] / 1e9:.0f} GB", f"cache: {document['cache']} (LIMBECK_CACHE)"


def _find_versions() -> dict[str, str]:
    """Find the versions of Limbeck, Python and the libraries that are always needed."""
    # late, for a fast --help
    import importlib.metadata

    from limbeck.core.version import __version__

    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"limbeck": __version__, "python": platform.python_version(), **versions}


def _inspect_machine() -> dict[str, Any]:
    """Find the device, its speed in matrix products, and the number of threads."""
    # late, for a fast --help
    import torch

    from limbeck.training.plan import measure_matmul_flops

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": cuda,
        "threads": torch.get_num_threads(),
        "flops_per_second": measure_matmul_flops(torch.device("cuda" if cuda else "cpu"), 576),
    }


def _inspect_cache() -> dict[str, Any]:
    """List the assets in the cache, with the commands that bring the others, and the free disk space."""
    # late, for a fast --help
    from limbeck.core.storage import cache_root
    from limbeck.data.offline import embedded, packs

    assets: list[dict[str, Any]] = []
    for asset in embedded.list_assets():
        folder = str(asset.folder) if asset.present else None
        assets.append({"name": asset.name, "bytes": asset.bytes, "folder": folder, "command": asset.command})
    for pack in map(packs.get_pack, packs.PACK_MODULES):
        manifest = packs.load_pack_manifest(pack)
        size = sum(one["bytes"] for one in manifest["files"].values()) if manifest else 0
        folder = str(packs.get_pack_folder(pack)) if manifest else None
        assets.append({"name": f"pack {pack.name}", "bytes": size, "folder": folder, "command": pack.command})
    cache = cache_root()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    return {"assets": assets, "cache": str(cache), "free_bytes": shutil.disk_usage(existing).free}


def _list_kernels(check: bool) -> Iterator[tuple[str, str, str]]:
    """List the kernel adapters: name, whether they can run here, and why not or what they serve."""
    # late, for a fast --help
    from limbeck import ops  # noqa: F401  (operators register themselves)
    from limbeck.ops import fla

    missing = fla.unavailable_reason()
    if missing is not None:
        yield "kernels", "torch", f"{missing}; every operator runs in torch"
        return
    with progress("check kernels", total=len(fla.KERNEL_ADAPTERS) if check else 0, unit="kernels") as advance:
        for adapter in fla.KERNEL_ADAPTERS:
            call = fla.make_sample_call(adapter, time=1 if adapter.form == "recurrent" else 256)
            state, note = "available", f"for {adapter.used_by}; checked when first used"
            if reason := fla.unsupported_reason(call):
                state, note = "declined", reason
            elif check:
                verdict = fla.verify_call(call)
                worst = max(verdict.errors.values(), default=0.0)
                state = "available" if verdict.ok else "declined"
                note = verdict.reason or f"for {adapter.used_by}; largest error in bf16 {worst:.1e}"
            advance(int(check), adapter.name)
            yield f"kernel {adapter.name}", state, note
