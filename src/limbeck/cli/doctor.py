"""limbeck doctor: what is here, what is missing, and the fix."""

import importlib.metadata
import importlib.util
import platform
import shutil

from rich.table import Table

from limbeck.cli import app
from limbeck.console import output

OPTIONAL = {
    "gguf": "the embedded teacher: pip install 'limbeck[gguf]'",
    "accelerate": "the embedded teacher: pip install 'limbeck[gguf]'",
    "datasets": "Hugging Face datasets as text: pip install 'limbeck[data]'",
    "pyarrow": "Parquet files as text: pip install 'limbeck[data]'",
    "tensorboard": "runs watched in TensorBoard: pip install 'limbeck[track]'",
    "lm_eval": "benchmarks: pip install 'limbeck[eval]'",
    "triton": "fast kernels on CUDA; not used by this version",
}


@app.command()
def doctor() -> None:
    """Print versions, threads, devices, backends and assets, and how to get what is missing."""
    import torch

    from limbeck import __version__, mixers, packs
    from limbeck import assets as embedded
    from limbeck.data.cache import cache_root
    from limbeck.plan import matmul_speed

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("limbeck", __version__, "")
    table.add_row("python", platform.python_version(), "")
    for name in ("torch", "transformers", "safetensors", "pydantic", "rich", "typer"):
        table.add_row(name, importlib.metadata.version(name), "")
    for name, fix in OPTIONAL.items():
        found = importlib.util.find_spec(name) is not None
        table.add_row(name, importlib.metadata.version(name) if found else "missing", "" if found else fix)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    table.add_row("device", torch.cuda.get_device_name() if cuda else "cpu", "" if cuda else "no CUDA device found")
    table.add_row("threads", str(torch.get_num_threads()), "set OMP_NUM_THREADS=1 beside another busy process")
    table.add_row("matrix products", f"{matmul_speed(device, 576) / 1e9:.0f} GFLOP/s", "")
    for name in sorted(mixers.names()):
        table.add_row(f"backend of {name}", "torch", "")
    for asset in embedded.status():
        size = f"{asset.bytes / 1e6:.0f} MB" if asset.present else "not fetched"
        table.add_row(asset.name, size, str(asset.folder) if asset.present else "limbeck assets")
    for pack in map(packs.find, packs.MODULES):
        manifest = packs.manifest_of(pack)
        size = f"{sum(one['bytes'] for one in manifest['files'].values()) / 1e6:.0f} MB" if manifest else "not fetched"
        table.add_row(f"pack {pack.name}", size, str(packs.folder_of(pack)) if manifest else pack.command)
    cache = cache_root()
    place = next(p for p in (cache, *cache.parents) if p.exists())
    table.add_row("free disk", f"{shutil.disk_usage(place).free / 1e9:.0f} GB", f"cache: {cache} (LIMBECK_CACHE)")
    output.print(table)
