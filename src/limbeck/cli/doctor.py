"""limbeck doctor: what is installed, what is missing, and how to get it."""

import importlib.metadata
import platform
import shutil
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.table import Table

from limbeck.cli import app
from limbeck.cli.options import examples
from limbeck.core.console import output, progress

OPTIONAL_PACKAGES = {
    "gguf": "the embedded teacher: pip install 'limbeck[gguf]'",
    "accelerate": "the embedded teacher: pip install 'limbeck[gguf]'",
    "datasets": "Hugging Face datasets as text: pip install 'limbeck[data]'",
    "pyarrow": "Parquet files as text: pip install 'limbeck[data]'",
    "tensorboard": "runs watched in TensorBoard: pip install 'limbeck[track]'",
    "lm_eval": "benchmarks: pip install 'limbeck[eval]'",
    "triton": "kernels on CUDA: pip install 'limbeck[cuda]'",
    "fla-core": "kernels on CUDA: pip install 'limbeck[cuda]'",
}


@app.command(epilog=examples("limbeck doctor", "limbeck doctor --kernels"))
def doctor(
    check_kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Compare every kernel with torch on this GPU (takes minutes the first time)."),
    ] = False,
) -> None:
    """Print versions, threads, devices, kernels and assets, and how to get what is missing."""
    # late, for a fast --help
    import torch

    from limbeck.core.storage import cache_root
    from limbeck.core.version import __version__
    from limbeck.data.offline import embedded, packs
    from limbeck.training.plan import measure_matmul_flops

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("limbeck", __version__, "")
    table.add_row("python", platform.python_version(), "")
    for name in ("torch", "transformers", "safetensors", "pydantic", "rich", "typer"):
        table.add_row(name, importlib.metadata.version(name), "")
    for name, fix in OPTIONAL_PACKAGES.items():
        try:
            table.add_row(name, importlib.metadata.version(name), "")
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "missing", fix)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    table.add_row("device", torch.cuda.get_device_name() if cuda else "cpu", "" if cuda else "no CUDA device found")
    table.add_row("threads", str(torch.get_num_threads()), "set OMP_NUM_THREADS=1 if another process is busy")
    table.add_row("matrix products", f"{measure_matmul_flops(device, 576) / 1e9:.0f} GFLOP/s", "")
    for row in _list_kernels(check_kernels):
        table.add_row(*row)
    for asset in embedded.list_assets():
        size = f"{asset.bytes / 1e6:.0f} MB" if asset.present else "not downloaded"
        table.add_row(asset.name, size, str(asset.folder) if asset.present else "limbeck assets")
    for pack in map(packs.get_pack, packs.PACK_MODULES):
        manifest = packs.load_pack_manifest(pack)
        size = (
            f"{sum(one['bytes'] for one in manifest['files'].values()) / 1e6:.0f} MB" if manifest else "not downloaded"
        )
        table.add_row(f"pack {pack.name}", size, str(packs.get_pack_folder(pack)) if manifest else pack.command)
    cache = cache_root()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    table.add_row("free disk", f"{shutil.disk_usage(existing).free / 1e9:.0f} GB", f"cache: {cache} (LIMBECK_CACHE)")
    output.print(table)


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
