"""The GPU path, measured: one command on a machine with torch, triton, transformers and fla-core, no network needed.

    python benchmarks/gpu.py all --json gpu.json                # every section, at most --seconds each
    python benchmarks/gpu.py stages --json gpu.json             # one; its rows replace those in the file
    python benchmarks/gpu.py report --json gpu.json --report docs/guides/gpu.md
    python benchmarks/gpu.py all --dry                          # on a CPU with tiny shapes: does it run?

Weights are random and of the real shape, unless --teacher names a folder. A section that runs out of seconds says so in
its rows. What each section measures is told at the top of its file in benchmarks/gpu_sections/, and in
docs/guides/gpu.md.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import transformers
from rich.console import Console
from rich.table import Table

import limbeck
from gpu_sections.bench import Bench

SECTIONS = ("correctness", "operators", "stages", "mfu", "decoding", "loss", "peers")
BEGIN, END = "<!-- figures: written by benchmarks/gpu.py report -->", "<!-- end of figures -->"
console = Console(width=None if sys.stdout.isatty() else 180)


def main() -> None:
    args = _parser().parse_args()
    path = Path(args.json) if args.json else None
    if args.section == "report":
        if path is None or not path.is_file() or not args.report:
            sys.exit("report: give --json FILE with what was measured, and --report FILE to write it into")
        write_report(Path(args.report), json.loads(path.read_text(encoding="utf-8")))
        return
    device = torch.device("cuda" if torch.cuda.is_available() and not args.dry else "cpu")
    if device.type == "cpu" and not args.dry:
        sys.exit("gpu.py: there is no GPU here; --dry runs everything through on a CPU")
    if args.dry:
        torch.set_num_threads(1)
    wrong = 0
    for name in SECTIONS if args.section == "all" else (args.section,):
        found = measured(name, device, args)
        wrong += sum(row.get("ok") is False for row in found["rows"])
        show(name, found)
        if path is not None:
            known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            path.write_text(json.dumps({**known, name: found}, indent=1) + "\n", encoding="utf-8")
    if wrong:
        sys.exit(f"{wrong} results are wrong by more than their bounds")


def measured(name: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """A section's rows, and where they come from."""
    bench = Bench(device, args.dry, args.seconds, args)
    importlib.import_module(f"gpu_sections.{name}").run(bench)
    return {
        "rows": bench.rows,
        "notes": bench.notes,
        "dry": args.dry,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - bench.began, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "versions": versions(),
        "command": f"python benchmarks/gpu.py {name} " + " ".join(_given(args)),
    }


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"limbeck": limbeck.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    for name in ("triton", "fla", "liger_kernel"):
        try:
            found[name] = getattr(importlib.import_module(name), "__version__", "there")
        except ImportError:
            found[name] = "not installed"
    return found


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """All columns in the order in which they first come, what was told in the end."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return sorted(columns, key=lambda name: name == "told")


def show(name: str, found: dict[str, Any]) -> None:
    """Print a section's rows."""
    columns = columns_of(found["rows"])
    table = Table(*columns, title=f"{name}: {found['device']}, {found['seconds']} s", title_justify="left")
    for row in found["rows"]:
        table.add_row(*("" if row.get(column) is None else str(row[column]) for column in columns))
    console.print(table)
    for note in found["notes"]:
        console.print(note)


def write_report(path: Path, found: dict[str, Any]) -> None:
    """Put the figures between their two marks in a Markdown file; dry ones are refused."""
    parts = []
    for name in (n for n in SECTIONS if n in found):
        section = found[name]
        if section["dry"]:
            sys.exit(f"report: {name} was measured with --dry, and such figures mean nothing")
        columns = columns_of(section["rows"])
        used = ", ".join(f"{k} {v}" for k, v in section["versions"].items())
        lines = [f"### {name}", "", f"`{section['command']}`, {section['date']}, {section['device']}; {used}.", ""]
        lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        for row in section["rows"]:
            cells = ("" if row.get(c) is None else str(row[c]).replace("|", "\\|") for c in columns)
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join([*lines, *("", *section["notes"])] if section["notes"] else lines))
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        sys.exit(f"report: {path} has no place for figures ({BEGIN} ... {END})")
    path.write_text(f"{head}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{tail}", encoding="utf-8")


def _given(args: argparse.Namespace) -> list[str]:
    """The options that are not as they are by default."""
    default = _parser().parse_args(["all"])
    names = ("models", "mixers", "rows", "length", "longest", "repeats", "seconds", "teacher")
    given = [(name, getattr(args, name)) for name in names]
    return [f"--{name} {value}" for name, value in given if value != getattr(default, name)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=[*SECTIONS, "all", "report"])
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, one repetition")
    parser.add_argument("--seconds", type=float, default=480, help="after which a section begins no more cases")
    parser.add_argument("--json", help="file that rows are merged into")
    parser.add_argument("--report", help="Markdown file whose figures are rewritten")
    parser.add_argument("--models", default="135m,360m", help="shapes: 135m, 360m")
    parser.add_argument("--mixers", default="gated_deltanet,gla,retnet")
    parser.add_argument("--rows", type=int, default=8, help="sequences of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--longest", type=int, default=65536, help="tokens of the longest sequence that is trained on")
    parser.add_argument("--repeats", type=int, default=10, help="timed repetitions of a case")
    parser.add_argument("--teacher", help="folder of a real teacher in the place of random weights")
    parser.add_argument("--checkout", help="checkout of the author's code, for the section peers")
    return parser


if __name__ == "__main__":
    main()
