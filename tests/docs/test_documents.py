"""Commands that the README, the documents and error messages give: they parse, name what exists, and run."""

import itertools
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.paths import ROOT
from limbeck import Recipe, mixers
from limbeck.cli import main
from limbeck.cli.convert import convert as _convert
from limbeck.cli.distill import build_recipe
from limbeck.cli.eval import _parse_measure_settings
from limbeck.core.recipe import BUILT_IN, TeacherRecipe
from limbeck.data.offline import packs
from limbeck.evaluation import measure
from limbeck.study import Study
from limbeck.study.spec import STUDIES_FOLDER

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
OWN = ("recipe.yaml", "mine.yaml")  # files that a reader makes with `limbeck recipe`


def commands_of(text: str) -> list[str]:
    """The `limbeck ...` commands of a page: lines of its code blocks, and in running text."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash", "sh", "console") else ():
            found += re.findall(r"^(?:\$ )?(?:.* -m )?(limbeck (?!=).*)$", line.strip())
    running = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    found += re.findall(r"(?<!`)`(limbeck [a-z][^`]*)`(?!`)", running)
    return [line for line in found if not line.startswith("limbeck import")]


COMMANDS = sorted(
    {(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands_of(page.read_text("utf-8"))}
)


def words_of(line: str) -> list[str]:
    words = shlex.split(line.replace("--task N", "--task 0"), comments=True)[1:]
    words = list(itertools.takewhile(lambda word: word not in (">", "<", "|"), words))
    return [word for word in words if word not in ("...", "MODEL...")]


def test_commands_are_found():
    assert len(COMMANDS) > 120
    assert len({verb for _, line in COMMANDS for verb in words_of(line)[:1]}) >= 14


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_of_the_documents_parses_and_names_what_exists(page, line, verbs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(line, verbs)


def check(line: str, verbs: dict) -> None:
    """Raise what the command line would raise, as far as that needs no model."""
    words = words_of(line)
    while words and words[0].startswith("--"):
        words = words[2:] if words[0] in ("--mixer", "--mixer-file") else words[1:]
    if not words:
        return
    verb, *arguments = words
    assert verb in verbs, f"no verb {verb}"
    needed = [p for p in verbs[verb].params if p.param_type_name == "argument" and p.required]
    if not arguments and needed:  # the verb is only named
        return
    given = dict(verbs[verb].make_context(verb, list(arguments)).params)
    if verb == "distill":
        if given["student"] and given["student"].endswith(".py"):
            given["student"] = "gla"
        name = given.pop("recipe")
        name = "quickstart" if name in (*OWN, "NAME") else name
        settings = [one for one in given.pop("set") or [] if not one.endswith("=")]
        options = {key: given[key] for key in ("teacher", "student", "layers", "stages", "tokens", "data", "out")}
        recipe = build_recipe(name, **options, settings=settings)
        mixers.resolve_options(recipe.student.mixer, recipe.student.options, recipe.student.preset)
    elif verb == "study":
        name = given["study"]
        if name not in (None, "STUDY", "FOLDER", *OWN):
            Study.load(name, given["size"])
    elif verb == "eval":
        names = (
            list(measure.MEASURE_MODULES) if given["measure"] == "all" else (given["measure"] or "agreement").split(",")
        )
        names += ["tasks"] if given["tasks"] else []
        for name, settings in _parse_measure_settings(given["set"] or [], names).items():
            measure.parse_settings(measure.get_measure(name), settings)
    elif verb == "convert":
        raw: dict = {"mixer": given["student"] or "gated_deltanet"}
        for one in given["set"] or []:
            key, _, value = one.partition("=")
            raw.setdefault(*key.split(".")[:1], {})[key.split(".")[-1]] = value
        Recipe.parse({"student": raw})
        assert callable(_convert)
    elif verb in ("students", "matrices"):
        which = given["which" if verb == "students" else "students"]
        mixers.select_mixers("all" if which == "NAME" else which)
        assert given["preset"] in mixers.PRESETS
    elif verb == "assets":
        for name in given["pack"] or []:
            packs.get_pack(name)
        if given["teacher"] not in ("embedded", *OWN):
            TeacherRecipe.load(given["teacher"])
    elif verb == "recipe":
        folders = BUILT_IN, BUILT_IN / "teachers", STUDIES_FOLDER
        assert any((folder / f"{given['name']}.yaml").is_file() for folder in folders) or given["name"] == "NAME"
    elif verb == "families":
        mixers.get(given["student"])


def test_a_file_that_a_command_needs_is_made_on_the_same_page():
    for page in (path for path in PAGES if path.name not in ("README.md", "commands.md")):
        text = page.read_text(encoding="utf-8")
        needed = {name for line in commands_of(text) for name in words_of(line) if name in OWN}
        for name in needed:
            assert re.search(rf"limbeck recipe \S+ > {name}|{name} from `limbeck recipe`", text), f"{page}: {name}"


# ------------------------------------------------------------------ the cheap ones run, in tiny form


@pytest.fixture(scope="module")
def deep(tmp_path_factory, shared_tokenizer) -> Path:
    """A teacher as deep as the embedded one, and hardly wider than nothing."""
    folder = tmp_path_factory.mktemp("deep")
    sizes = {"hidden_size": 18, "intermediate_size": 8, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=len(shared_tokenizer), num_hidden_layers=30, head_dim=2, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    shared_tokenizer.save_pretrained(folder)
    return folder


def place_for(folder: Path, teacher: Path, corpus: Path) -> None:
    stages = [{"stage": name, "tokens": 64, "batch_size": 1} for name in ("calibrate", "hidden", "logits")]
    data = {"source": str(corpus), "seq_len": 32, "held_out": 0.2}
    evaluation = {"tokens": 64, "new_tokens": 2}
    raw = {"name": "quickstart", "teacher": str(teacher), "data": data, "stages": stages, "evaluation": evaluation}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**raw, "trackers": []}), encoding="utf-8")
    (folder / "softmax_layers.json").write_text(json.dumps({"softmax_layers": [0, 9, 18]}), encoding="utf-8")
    (folder / "softmax_heads.json").write_text(json.dumps({"softmax_heads": ["0.0", "9.1"]}), encoding="utf-8")


def exit_code(words: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["limbeck", *words])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def run(words: list[str], capsys) -> str:
    code = exit_code(words)
    seen = capsys.readouterr()
    assert code == 0, f"limbeck {shlex.join(words)}\n{seen.out}{seen.err}"
    return seen.out + seen.err


def distills() -> list[str]:
    """The documents' distill commands that this machine can run, each once."""
    lines = {shlex.join(words_of(line)) for _, line in COMMANDS if words_of(line)[:1] == ["distill"]}
    unfit = ("teacher_bits", ".py", "sharding", "find-lr", "NAME")
    return sorted(line for line in lines if not any(word in line for word in unfit))


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize("line", distills())
def test_a_distill_command_of_the_documents_runs_in_tiny_form(line, deep, corpus, tmp_path, monkeypatch, capsys):
    """With a tiny teacher and text, up to its plan, which checks all that a run does and takes a step of each stage."""
    if "lora" in line:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    place_for(tmp_path, deep, corpus)
    ours = {"--teacher": str(deep), "--data": str(corpus), "--tokens": "192"}
    _, *words = shlex.split(line)
    for option, value in ours.items():
        if option in words:
            words[words.index(option) + 1] = value
    named = bool(words) and not words[0].startswith("--")
    said = run(["distill", "recipe.yaml", *(words[1:] if named else words), "--plan"], capsys)
    assert "trained parameters" in said


@pytest.fixture(scope="module")
def runs(tmp_path_factory, teacher_folder, corpus) -> Path:
    """A folder with the runs that the documents name, all of them one tiny run."""
    folder = tmp_path_factory.mktemp("runs")
    place_for(folder, teacher_folder, corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert exit_code(["distill", "recipe.yaml", "--out", "runs/mine"]) == 0
    for name in ("a", "b", "quickstart", "smoke", "gla", "mlstm", "kda", "retnet"):
        subprocess.run(["cp", "-r", "runs/mine", f"runs/{name}"], cwd=folder, check=True)
    return folder


LINES = [
    'generate runs/quickstart/student "The history of science is" --tokens 3',
    "report runs/a runs/b",
    "report runs/gla runs/mlstm runs/kda --out compared.html",
    "push runs/mine someone/my-student --dry-run --license apache-2.0 --teacher someone/teacher",
    "eval runs/retnet runs/gla --measure agreement,mixing,hidden --out comparison --tokens 64 "
    "--set agreement.prefixes=0 --set mixing.window=8",
    "eval --from comparison --from runs/retnet",
    "select softmax_layers.json --num-softmax-layers 1 --by both --teacher TEACHER --data TEXT --seq-len 32 --tokens "
    "64 --judged 64",
    "matrices matrices.png --teacher TEACHER --data TEXT --students paper-v3 --layer 1 --seq-len 32 --steps 1",
    "students paper-v3 --preset published",
    "students paper-v3 --preset published --options",
    "study --list",
    "eval --list",
    "recipe quickstart",
]


@pytest.mark.parametrize("line", LINES)
def test_other_commands_of_the_documents_run_in_tiny_form(line, runs, teacher_folder, corpus, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    words = shlex.split(line.replace("TEACHER", str(teacher_folder)).replace("TEXT", str(corpus)))
    assert run(words, capsys)


@pytest.mark.parametrize("name", sorted(path.stem for path in BUILT_IN.glob("*.yaml")))
def test_a_printed_recipe_is_the_recipe(name, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(run(["recipe", name], capsys), encoding="utf-8")
    assert Recipe.load(path) == Recipe.load(name)
    assert path.read_text(encoding="utf-8").count("#") > 20


@pytest.mark.parametrize("name", ["paper-experiment-1", "controlled", "small"])
def test_a_printed_study_or_teacher_is_one(name, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(run(["recipe", name], capsys), encoding="utf-8")
    assert (TeacherRecipe if name == "small" else Study).load(path).name == name
