"""The package as users have it: a wheel in an environment of its own, with core dependencies alone.

    make test-wheel                                  # builds the wheel, installs it into .venv/wheel, tries every verb
    python3 tests/check_wheel.py --pip-args "..."    # the same; the environment is kept for the next time

Without constraints.txt: pip takes the newest libraries that pyproject.toml allows, torch alone is given. Each verb
answers `--help`, has a small real use, and where that needs an extra it says which. Ends at the first that fails.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "limbeck"
RECIPE = """
name: tiny
teacher: teacher
data: {source: corpus.jsonl, seq_len: 32, held_out: 0.2}
stages: [{stage: calibrate, tokens: 64}, {stage: logits, tokens: 64, batch_size: 1}]
evaluation: {tokens: 64, new_tokens: 2}
"""
STUDY = """
name: tiny
base:
  teacher: teacher
  data: {source: corpus.jsonl, seq_len: 32, held_out: 0.2}
  stages: [{stage: calibrate, tokens: 64}]
grid: {students: [gla], stages: ["0"]}
"""
TEXT = ["--teacher", "teacher", "--data", "corpus.jsonl", "--seq-len", "32"]
# a use of each verb: what it prints, or the extra that it names
USES: list[tuple[list[str], str]] = [
    (["students"], "gated_deltanet"),
    (["recipe"], "teacher:"),
    (["doctor"], "extra report"),
    (["families", "llama"], "works"),
    (["check", "softmax", "--quick"], "cases passed"),
    (["assets", "--plan"], "limbeck[gguf]"),
    (["distill", "tiny.yaml", "--out", "run"], "written to run/"),
    (["distill", "--plan"], "limbeck[gguf]"),
    (["convert", "teacher", "--student", "gla", "--out", "student"], "new"),
    (["select", *TEXT, "--num-softmax-layers", "1", "--tokens", "64", "--eval-tokens", "64"], "softmax_layers.json"),
    (["generate", "run", "The", "--new-tokens", "2"], "tokens/s"),
    (["chat", "run", "--new-tokens", "2"], "tokens/s"),
    (["eval", "run", "--measure", "agreement", "--tokens", "64", "--seq-len", "32"], "agreement"),
    (["bench", "run", "--lengths", "32", "--new-tokens", "1", "--rounds", "1", "--prefill", "0"], "limbeck[report]"),
    (["study", "study.yaml"], "written to"),
    (["matrices", *TEXT, "--layer", "0"], "limbeck[report]"),
    (["report", "run"], "limbeck[report]"),
    (["export", "run", "--to", "onnx"], "limbeck[export]"),
    (["push", "run", "someone/tiny", "--plan", "--license", "mit"], "README.md"),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pip-args", default="", help="go to every pip install")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv" / "wheel")
    parser.add_argument("--inside", action="store_true", help="try the verbs in this very environment")
    given = parser.parse_args()
    if given.inside:
        try_verbs()
        return
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "-q"]
        source = copy_source(Path(folder, "source"))
        timed("build", [*pip, "wheel", "--no-deps", "-w", folder, *given.pip_args.split(), str(source)])
        (wheel,) = Path(folder).glob("*.whl")
        check_content(wheel)
        python = install(wheel, given.environment.absolute(), given.pip_args.split())
        surroundings = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LIMBECK"))}
        surroundings |= {"LIMBECK_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
        for verb in list_verbs(python, surroundings, folder):
            answer([str(python.parent / "limbeck"), verb, "--help"], surroundings, folder)
        inside = [str(python), str(Path(__file__).absolute()), "--inside"]
        subprocess.run(inside, cwd=folder, env=surroundings, check=True)


def timed(what: str, command: list[str]) -> None:
    start = time.monotonic()
    subprocess.run(command, check=True)
    print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)


def copy_source(folder: Path) -> Path:
    """Copy what a wheel is built from: a build in the checkout leaves files there that the next wheel would have."""
    shutil.copytree(SOURCE, folder / "src" / "limbeck", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def check_content(wheel: Path) -> None:
    """The wheel holds every file of the package and no other: code, recipes, studies, templates, catalog, py.typed."""
    files = {path.relative_to(SOURCE.parent).as_posix() for path in SOURCE.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    content = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    if files != content:
        sys.exit(f"not in the wheel: {sorted(files - content)}; in the wheel alone: {sorted(content - files)}")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB, {len(files)} files")


def install(wheel: Path, environment: Path, pip_args: list[str]) -> Path:
    """Install into an environment of its own, made at the first time; returns its Python."""
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "-q", "install", *pip_args]
    if not python.exists():
        timed("environment", [sys.executable, "-m", "venv", str(environment)])
        torch = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
        timed("torch", [*pip, torch[0] if torch else "torch"])
    timed("dependencies", [*pip, str(wheel)])
    timed("wheel", [*pip, "--no-deps", "--force-reinstall", str(wheel)])
    return python


def list_verbs(python: Path, surroundings: dict[str, str], folder: str) -> list[str]:
    code = "from limbeck.cli.verbs import VERBS; print(*VERBS)"
    done = subprocess.run(
        [str(python), "-c", code], cwd=folder, env=surroundings, check=True, capture_output=True, text=True
    )
    missing = set(done.stdout.split()) - {use[0] for use, _ in USES}
    if missing:
        sys.exit(f"no use is given of: {', '.join(missing)}")
    return done.stdout.split()


def answer(command: list[str], surroundings: dict[str, str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True)
    if done.returncode != 0 or "Examples:" not in done.stdout:
        sys.exit(f"{' '.join(command)}: {done.stdout}{done.stderr}")


# ------------------------------------------------------------------ in the environment of the wheel


def try_verbs() -> None:
    """Use each verb on a tiny teacher and text, in this process and folder."""
    import limbeck

    if ROOT in Path(limbeck.__file__).parents and ".venv" not in Path(limbeck.__file__).parts:
        sys.exit(f"this is the checkout: {limbeck.__file__}")
    make_place()
    for arguments, words in USES:
        start = time.monotonic()
        code, said = use(arguments)
        seconds = time.monotonic() - start
        print(f"  limbeck {' '.join(arguments)[:60]:60} {seconds:6.1f} s, exit code {code}", flush=True)
        if words not in said or code not in (0, 2) or "Traceback" in said:
            sys.exit(f"'{words}' is not in what it said, or it failed:\n{said}")


def make_place() -> None:
    """Write a teacher with its tokenizer, a text, a recipe and a study into this folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from limbeck.testing.tiny_models import make_tiny_model

    paragraphs = [p for p in (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n\n") if len(p) > 80]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(paragraphs, trainers.BpeTrainer(vocab_size=97, special_tokens=["<pad>", "<s>", "</s>"]))
    make_tiny_model("llama").save_pretrained("teacher")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained("teacher")
    lines = "".join(json.dumps({"text": p}) + "\n" for p in paragraphs)
    for name, text in (("corpus.jsonl", lines), ("tiny.yaml", RECIPE), ("study.yaml", STUDY)):
        Path(name).write_text(text, encoding="utf-8")


def use(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command and all that it printed."""
    from limbeck.cli import main as limbeck

    said, sys.argv, sys.stdin = io.StringIO(), ["limbeck", *arguments], io.StringIO("Hello\n")
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            limbeck()
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
    return 0, said.getvalue()


if __name__ == "__main__":
    main()
