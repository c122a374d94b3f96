"""Break a run at random instants and see whether anything is lost.

    python benchmarks/reliability.py                            # 50 kills and 40 other faults, most of an hour
    python benchmarks/reliability.py --kills 4 --others 8       # each fault in turn

A tiny teacher is distilled through all four stages, once undisturbed. Then the same run is broken again and again, at
an instant drawn at random, by SIGKILL, or by one of these:

    SIGTERM, Ctrl-C          a checkpoint, then the exit code of the signal
    full disk                another program takes the room on a tmpfs that is mounted for the test, which takes root;
                             without root `ulimit -f` refuses. Either way the system says no, to any library
    damaged checkpoint       SIGKILL, then one bit of the newest checkpoint is turned over
    token files gone         SIGKILL, then the cache of tokens is emptied
    killed in the export     SIGKILL while the student is being written
    killed in evaluation     SIGKILL after that, before the summary
    two processes            a second one on the same run directory, which has to be refused

Each time the same command is given again. When a broken run comes to its end, its weights have to be those of the
undisturbed one bit for bit, and so has its log: no step is missing, none is there twice. Nothing half-made may be
left. Steps that had to be done again are counted. Before all that two runs begin at once on one cold cache: the text
has to be read once.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from limbeck.core.recipe import Recipe
from limbeck.testing import make_tiny_model

TEXT = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
OTHERS = (
    "SIGTERM",
    "full disk",
    "damaged checkpoint",
    "token files gone",
    "killed in the export",
    "killed in evaluation",
    "two processes",
    "Ctrl-C",
)
DISK_MB = 64  # of the disk that is filled


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
    parser.add_argument("--others", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, _disk(Path(folder) / "disk") as mounted:
        tally = Breaker(Path(folder), random.Random(args.seed), mounted).run(args.kills, args.others)
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


@contextmanager
def _disk(place: Path) -> Iterator[bool]:
    """A small disk of its own for the runs, where this user may mount one; a folder elsewhere."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(place)]
    mounted = (
        shutil.which("mount") is not None and subprocess.run(command, check=False, capture_output=True).returncode == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=False)


class Breaker:
    """The undisturbed run, and runs that are broken."""

    def __init__(self, folder: Path, luck: random.Random, mounted: bool):
        self.folder, self.luck, self.mounted, self.tally = folder, luck, mounted, Tally()
        self.disk = folder / "disk"
        self.env = {**os.environ, "LIMBECK_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        tokenizer = _tokenizer()
        make_tiny_model("llama").save_pretrained(folder / "teacher")
        tokenizer.save_pretrained(folder / "teacher")
        (folder / "text.jsonl").write_text(
            "".join(json.dumps({"text": p}) + "\n" for p in TEXT.split("\n\n") if len(p) > 80), encoding="utf-8"
        )

    def run(self, kills: int, others: int) -> Tally:
        self._cold_cache()
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
            while plan and not (self.disk / path.stem / "eval.json").exists():
                self._strike(path, plan.pop(), seconds)
                print(f"\r{len(plan)} faults to go", end="", file=sys.stderr, flush=True)
            code, told = self._start(path).finish()
            if code:
                self.tally.wrong.append(f"run {number} did not come to its end: {told.strip()[-300:]}")
            else:
                self._compare(whole, path)
            shutil.rmtree(self.disk / path.stem, ignore_errors=True)
        print(file=sys.stderr)
        return self.tally

    def _cold_cache(self) -> None:
        """Two runs that begin at once where nothing is cached: both end well, and one of them has read the text."""
        paths = [self._recipe(f"cold{number}") for number in (1, 2)]
        ends = [process.finish() for process in [self._start(path) for path in paths]]
        if any(code for code, _ in ends):
            self.tally.wrong.append(f"two on a cold cache: {[told[-300:] for _, told in ends]}")
        readers = sum(any(line.startswith("read:") for line in told.splitlines()) for _, told in ends)
        if readers != 1:
            self.tally.wrong.append(f"two on a cold cache: {readers} of them read the text")
        self.tally.faults["two on a cold cache"] = 1
        for path in paths:
            shutil.rmtree(self.disk / path.stem)

    def _strike(self, path: Path, fault: str, seconds: float) -> None:
        """Start the run, break it at a random instant of what it has still to do."""
        run = self.disk / path.stem
        before = _steps(run)
        limited = fault == "full disk" and not self.mounted
        process = self._start(path, most_bytes=self.luck.randrange(1000, 400_000) if limited else None)
        expected = {"SIGTERM": (143,), "Ctrl-C": (130,), "full disk": (2,)}.get(fault, (-signal.SIGKILL,))
        if fault == "killed in the export":
            self._wait(process, lambda: (run / ".student.tmp").exists())
        elif fault == "killed in evaluation":
            self._wait(process, lambda: (run / "student").exists() and not (run / ".student.tmp").exists())
        else:
            self._wait(process, lambda: _steps(run) > before)  # it starts, reads what is there and makes a step
            if not limited:
                time.sleep(self.luck.uniform(0, 0.2 * seconds))
        if fault == "two processes":
            expected = (0,)
            second, told = self._start(path).finish()
            if process.alive() and (second != 2 or "another process is working" not in told):
                self.tally.wrong.append(f"a second process on {run.name} ended with {second}: {told[-300:]}")
        elif fault == "full disk":
            if self.mounted:
                self._fill(leave=self.luck.choice([0, 20_000, 150_000, 300_000]))
        else:
            process.send({"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}.get(fault, signal.SIGKILL))
        ended, told = process.finish()
        (self.disk / "filler").unlink(missing_ok=True)
        if "Traceback" in told:
            self.tally.wrong.append(f"{fault}: a traceback: {told[-400:]}")
        if ended not in (*expected, 0):
            self.tally.wrong.append(f"{fault}: it ended with {ended}: {told[-300:]}")
        if (
            fault == "full disk"
            and ended == 2
            and not any(word in told for word in ("is full", "not enough disk space", "size limit", "truncated"))
        ):
            self.tally.wrong.append(f"{fault}: {told[-300:]}")
        if fault == "full disk" and (run / ".student.tmp").exists():
            self.tally.wrong.append(f"{fault}: a half-made student was left")
        if (run / "eval.json").exists() and fault != "two processes":
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

    def _wait(self, process: "Process", until: Callable[[], bool]) -> None:
        while process.alive() and not until():
            time.sleep(0.001)

    def _fill(self, leave: int) -> None:
        """Take the room on the disk, all but `leave` bytes."""
        with open(self.disk / "filler", "wb", buffering=0) as file, suppress(OSError):
            while (free := shutil.disk_usage(self.disk).free) > leave:
                file.write(bytes(min(free - leave, 1 << 20)))

    def _compare(self, whole: Path, broken: Path) -> None:
        first, second = (self.disk / p.stem for p in (whole, broken))
        weights = [(run / "student" / "model.safetensors").read_bytes() for run in (first, second)]
        if weights[0] != weights[1]:
            self.tally.wrong.append(f"{broken.stem}: the weights are others than undisturbed")
        logs = [_log(run) for run in (first, second)]
        if logs[0] != logs[1]:
            self.tally.wrong.append(f"{broken.stem}: the log is another than undisturbed")
        if left := [path.relative_to(second).as_posix() for path in second.rglob("*.tmp")]:
            self.tally.wrong.append(f"{broken.stem}: left behind: {left}")

    def _recipe(self, name: str) -> Path:
        stage = {"tokens": 16_384, "batch_size": 4}
        path = self.folder / f"{name}.yaml"
        recipe = {
            "name": "tiny",
            "teacher": str(self.folder / "teacher"),
            "student": {"mixer": "gated_deltanet"},
            "data": {"source": str(self.folder / "text.jsonl"), "seq_len": 32, "held_out": 0.2},
            "stages": [{"stage": "calibrate", "tokens": 4096}]
            + [{"stage": stage_name, **stage} for stage_name in ("matrix", "hidden", "logits")],
            "evaluation": {"tokens": 256, "prompt": None},
            "checkpoint_seconds": 0.5,
            "out": str(self.disk / name),
        }
        path.write_text(Recipe.parse(recipe).to_yaml(), encoding="utf-8")
        return path

    def _start(self, path: Path, most_bytes: int | None = None) -> "Process":
        command = [sys.executable, "-m", "limbeck", "distill", str(path)]
        if most_bytes is not None:
            command = ["bash", "-c", f'ulimit -f {-(-most_bytes // 1024)}; exec "$@"', "bash", *command]
        return Process(command, self.env)


def _hear_signals() -> None:
    """In a child before it begins: a benchmark under nohup or a shell's `&` ignores signals, and passes that on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Process:
    """A command, its output kept."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self.output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (it lives as long as the process)
        self.process = subprocess.Popen(
            command, env=env, stdout=self.output, stderr=subprocess.STDOUT, preexec_fn=_hear_signals
        )

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
