"""Decoding through compiled blocks: how long compiling takes, at the first start and when torch has it on disk.

    python benchmarks/compiling.py                                        # the default student: three minutes
    python benchmarks/compiling.py --student gated_deltanet --sequences 8
    python benchmarks/steps.py --parts decode,compiled                    # how fast a token is then, in turns

Seconds are those of the processor, the C++ compiler's included, from a loaded student to the first compiled token, in
a new process each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from step_parts import STUDENTS, load_teacher, narrow_compiled

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="limbeck", help="limbeck, or a mixer's name")
    parser.add_argument("--options", type=json.loads, default={}, help="of the mixer, as JSON")
    parser.add_argument("--teacher", default="embedded", help="also tiny, a random model of two layers")
    parser.add_argument("--sequences", type=int, default=1, help="decoded at once")
    parser.add_argument("--weights", default="float32", choices=["float32", "float16"])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(time_first_token(args)))
        return
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        more = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": folder}
        for name in ("first", "second"):
            command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
            done = subprocess.run(command, env={**os.environ, **more}, stdout=subprocess.PIPE, text=True, check=True)
            seconds.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name} start: {seconds[-1]:.1f} s to the first compiled token", flush=True)
    print(f"the second takes {seconds[1] / seconds[0]:.2f} of the first")


def time_first_token(args: argparse.Namespace) -> float:
    """Return the seconds of processor time until the first compiled token, those of compilers included."""
    import torch

    import limbeck
    from limbeck.models import compile_decoding

    torch.set_num_threads(1)
    settings = {"mixer": args.student, **STUDENTS.get(args.student, {})}
    settings["options"] = {**settings.get("options", {}), **args.options}
    student = limbeck.convert(load_teacher(args.teacher), **settings, share_weights=True).eval().requires_grad_(False)
    student = narrow_compiled(student, args.weights)
    ids = torch.full((args.sequences, 8), 5)
    spent = sum(os.times()[:4])
    with compile_decoding(student):
        student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    # processes that compile are counted once they have ended
    torch._inductor.async_compile.shutdown_compile_workers()
    return sum(os.times()[:4]) - spent


if __name__ == "__main__":
    main()
