"""Break a run at random instants and see whether anything is lost.

    python benchmarks/reliability.py                            # 50 kills and 30 other faults, half an hour
    python benchmarks/reliability.py --kills 4 --others 3       # what CI runs

A tiny teacher is distilled through all four stages, once undisturbed. Then the same run is broken again and again, at
an instant drawn at random, by SIGKILL, or by SIGTERM, a full disk, a damaged newest checkpoint, or token files that are
gone; each time the same command is given again. When a broken run comes to its end, its weights have to be those of the
undisturbed one bit for bit, and so has its log. Steps that had to be done again are counted.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from limbeck.contract import tiny
from limbeck.recipe import Recipe

TEXT = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
LIMBECK = "from limbeck.cli import main; main()"
# the disk is full when so many more megabytes have been written: half of the file is there, then the system says no
FULL_DISK = f"""
import errno, safetensors.torch, limbeck.stages.run as run
left, save = [{{room}}], run.save_file
def failing(tensors, path):
    left[0] -= sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6
    save(tensors, path)
    if left[0] < 0:
        with open(path, "r+b") as file:
            file.truncate(100)
        raise OSError(errno.ENOSPC, "No space left on device")
run.save_file = failing
{LIMBECK}
"""
OTHERS = ("SIGTERM", "full disk", "damaged checkpoint", "token files gone")


@dataclass
class Tally:
    """What happened."""

    faults: dict[str, int] = field(default_factory=dict)
    stages: dict[str, int] = field(default_factory=dict)  # where the runs stood
    again: list[int] = field(default_factory=list)  # steps done twice, one number a fault
    wrong: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--others", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = Breaker(Path(folder), random.Random(args.seed)).run(args.kills, args.others)
    for name, count in tally.faults.items():
        print(f"{name:22} {count:4}")
    where = ", ".join(f"{name} {count}" for name, count in tally.stages.items())
    print(f"struck in: {where}")
    mean = sum(tally.again) / len(tally.again)
    print(f"steps done again after a fault: {max(tally.again)} at most, {mean:.1f} on average")
    for problem in tally.wrong:
        print(f"WRONG: {problem}")
    if args.json:
        args.json.write_text(json.dumps(vars(tally), indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if tally.wrong else 0)


class Breaker:
    """The undisturbed run, and runs that are broken."""

    def __init__(self, folder: Path, luck: random.Random):
        self.folder, self.luck, self.tally = folder, luck, Tally()
        self.env = {**os.environ, "LIMBECK_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        tokenizer = _tokenizer()
        tiny("llama").save_pretrained(folder / "teacher")
        tokenizer.save_pretrained(folder / "teacher")
        (folder / "text.jsonl").write_text(
            "".join(json.dumps({"text": p}) + "\n" for p in TEXT.split("\n\n") if len(p) > 80), encoding="utf-8"
        )

    def run(self, kills: int, others: int) -> Tally:
        began = time.monotonic()
        whole = self._recipe("whole")
        code, told = self._start(whole).finish()
        assert code == 0, told
        seconds = time.monotonic() - began
        plan = ["SIGKILL"] * kills + [OTHERS[i % len(OTHERS)] for i in range(others)]
        self.luck.shuffle(plan)
        number = 0
        while plan:
            number += 1
            path = self._recipe(f"broken{number}")
            while plan and not (path.parent / path.stem / "eval.json").exists():
                self._strike(path, plan.pop(), seconds)
                print(f"\r{len(plan)} faults to go", end="", file=sys.stderr, flush=True)
            code, told = self._start(path).finish()
            if code:
                self.tally.wrong.append(f"run {number} did not come to its end: {told.strip()[-300:]}")
            else:
                self._compare(whole, path)
        print(file=sys.stderr)
        return self.tally

    def _strike(self, path: Path, fault: str, seconds: float) -> None:
        """Start the run, break it at a random instant of what it has still to do."""
        run = path.parent / path.stem
        code = FULL_DISK.format(room=self.luck.uniform(0, 3)) if fault == "full disk" else LIMBECK
        before = _steps(run)
        process = self._start(path, code)
        while process.alive() and _steps(run) <= before:  # it starts, reads what is there and makes a step
            time.sleep(0.02)
        if fault != "full disk":
            time.sleep(self.luck.uniform(0, 0.2 * seconds))
            process.send(signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL)
        ended, told = process.finish()
        if "Traceback" in told:
            self.tally.wrong.append(f"{fault}: a traceback: {told[-400:]}")
        if fault == "full disk" and ended == 2 and "is full" not in told:
            self.tally.wrong.append(f"{fault}: {told[-300:]}")
        if (run / "eval.json").exists():
            return  # it was done before the fault came
        self.tally.faults[fault] = self.tally.faults.get(fault, 0) + 1
        reached, kept = _stage_and_step(run)
        self.tally.stages[reached] = self.tally.stages.get(reached, 0) + 1
        if fault == "damaged checkpoint":
            for newest in sorted(run.glob("stages/*/step-*"))[-1:]:
                raw = bytearray((newest / "model.safetensors").read_bytes())
                raw[self.luck.randrange(len(raw))] ^= 1 << self.luck.randrange(8)
                (newest / "model.safetensors").write_bytes(raw)
        if fault == "token files gone":
            for file in (self.folder / "cache" / "tokens").glob("*/*.tokens"):
                file.unlink()
        self.tally.again.append(kept)

    def _compare(self, whole: Path, broken: Path) -> None:
        first, second = ((p.parent / p.stem) for p in (whole, broken))
        weights = [(run / "student" / "model.safetensors").read_bytes() for run in (first, second)]
        if weights[0] != weights[1]:
            self.tally.wrong.append(f"{broken.stem}: the weights are others than undisturbed")
        logs = [_log(run) for run in (first, second)]
        if logs[0] != logs[1]:
            self.tally.wrong.append(f"{broken.stem}: the log is another than undisturbed")
        shutil.rmtree(second)

    def _recipe(self, name: str) -> Path:
        stage = {"tokens": 16_384, "batch": 4}
        path = self.folder / f"{name}.yaml"
        recipe = {
            "name": "tiny",
            "teacher": str(self.folder / "teacher"),
            "student": {"mixer": "gated_deltanet"},
            "data": {"source": str(self.folder / "text.jsonl"), "length": 32, "held_out": 0.2},
            "stages": [{"stage": "calibrate", "tokens": 4096}]
            + [{"stage": stage_name, **stage} for stage_name in ("matrix", "hidden", "logits")],
            "evaluation": {"tokens": 256, "prompt": None},
            "checkpoint_seconds": 0.5,
            "out": str(self.folder / name),
        }
        path.write_text(Recipe.parse(recipe).to_yaml(), encoding="utf-8")
        return path

    def _start(self, path: Path, code: str = LIMBECK) -> "Process":
        return Process([sys.executable, "-c", code, "distill", str(path)], self.env)


class Process:
    """A command, its output kept."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self.output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (it lives as long as the process)
        self.process = subprocess.Popen(command, env=env, stdout=self.output, stderr=subprocess.STDOUT)

    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, number: int) -> None:
        if self.alive():
            self.process.send_signal(number)

    def finish(self) -> tuple[int, str]:
        self.process.wait(timeout=600)
        self.output.seek(0)
        return self.process.returncode, self.output.read()


def _log(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def _steps(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_text(encoding="utf-8").count("\n") if log.exists() else 0


def _stage_and_step(run: Path) -> tuple[str, int]:
    """The stage that the log ends in, and how many of its steps are in no checkpoint."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if (run / "metrics.jsonl").exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    if not whole:
        return "calibrate", 0
    last = whole[-1]
    folder = run / "stages" / f"{last['stage_index']}-{last['stage']}"
    if (folder / "done").exists():
        return last["stage"], 0
    kept = [int(p.name.removeprefix("step-")) for p in folder.glob("step-*")]
    return last["stage"], last["step"] - max(kept, default=0)


def _tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    raw.train_from_iterator(
        TEXT.splitlines(), trainers.BpeTrainer(vocab_size=97, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


if __name__ == "__main__":
    main()
