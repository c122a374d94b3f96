"""What the command line says of itself: verbs in groups, examples that parse, one name for one thing, and at once."""

import ast
import inspect
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict

import pytest

from helpers.paths import ROOT
from limbeck import LimbeckError
from limbeck.cli import catalog, completion
from limbeck.cli.old_options import OLD_OPTIONS, rename_old_options
from limbeck.cli.verbs import GROUPS, VERBS
from limbeck.core.counts import parse_count
from limbeck.core.recipe import BUILT_IN

CLI = ROOT / "src" / "limbeck" / "cli"
ANSWERED_AT_ONCE = [["--help"], ["students"], ["study", "--list"]]


def limbeck(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    code = "from limbeck.__main__ import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
    )


def cpu_seconds(command: list[str]) -> float:
    """CPU time of a process: how busy the machine is matters less than for the time that passes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_what_needs_no_model_takes_a_few_times_what_python_takes():
    """On a quiet machine `python -c pass` takes 0.02 s and these 0.2 s; with torch it would be 200 times as much."""
    nothing = statistics.median(cpu_seconds([sys.executable, "-c", "pass"]) for _ in range(5))
    for arguments in ANSWERED_AT_ONCE:
        run = [sys.executable, "-m", "limbeck", *arguments]
        assert statistics.median(cpu_seconds(run) for _ in range(3)) < 60 * nothing, arguments


# ------------------------------------------------------------------ the list of verbs


def test_every_verb_is_in_one_group_and_its_line_is_whole_at_80_columns(verbs):
    assert len(set(VERBS)) == len(VERBS)
    assert set(VERBS) == set(verbs)
    help = limbeck("--help", COLUMNS="80").stdout.splitlines()
    assert all(f"{title}:" in help for title in GROUPS)
    for name, verb in verbs.items():
        first = inspect.cleandoc(verb.help).splitlines()[0].split(". ")[0].rstrip(".") + "."
        assert any(line.split(maxsplit=1) == [name, first] and len(line) <= 80 for line in help), (name, first)


@pytest.mark.parametrize("name", VERBS)
def test_the_examples_of_a_verb_parse(name, verbs):
    lines = [line.strip() for line in verbs[name].epilog.splitlines() if line.startswith("  ")]
    assert lines
    assert any(line.startswith(f"limbeck {name}") for line in lines)
    for line in lines:
        _, verb, *words = shlex.split(line.split(" < ")[0].split(" > ")[0])
        context = verbs[verb].make_context(verb, words)
        assert not context.args


# ------------------------------------------------------------------ one name for one thing


def test_an_option_means_the_same_in_all_verbs(verbs):
    """What is common is declared once; but for a few options that say what they count or write in their verb."""
    own = {"--set", "--tokens", "--new-tokens", "--plan", "--out", "--verify", "--list", "--student", "--teacher"}
    helps = defaultdict(set)
    for verb in verbs.values():
        for param in verb.params:
            if param.param_type_name == "option" and not param.hidden:
                for option in param.opts:
                    helps[option].add(param.help)
    several = {option for option, texts in helps.items() if len(texts) > 1}
    assert several <= own, several


def test_old_names_of_options_lead_to_new_ones_and_are_no_options_of_today(verbs, capsys):
    for verb, names in OLD_OPTIONS.items():
        today = {option for param in verbs[verb].params for option in param.opts} if verb else {"--mixer-file"}
        assert set(names.values()) <= today
        assert not set(names) & today, verb
    assert rename_old_options("eval", ["a", "--length=64", "--", "--length"]) == ["a", "--seq-len=64", "--", "--length"]
    assert "note: --length is now --seq-len" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("20M", 20_000_000),
        ("0.5k", 500),
        ("1e6", 10**6),
        ("1.5B", 1_500_000_000),
        ("2_000", 2000),
        ("7", 7),
        (512, 512),
    ],
)
def test_counts_are_read_as_people_write_them(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "1.5", "0.0001k", "many", "1e-3", "nan", "1e999", "20 MB"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(LimbeckError, match="is not a count"):
        parse_count(text)


# ------------------------------------------------------------------ completion and the catalog


def test_the_catalog_is_what_the_registries_say():
    assert json.loads(catalog.render_catalog()) == json.loads(catalog.CATALOG.read_text(encoding="utf-8")), (
        "python -m limbeck.cli.catalog"
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("limbeck dist", ["distill"]),
        ("limbeck distill lim", ["limbeck"]),
        ("limbeck distill --student gated_d", ["gated_deltanet"]),
        ("limbeck distill --stages 0,", ["0,hidden", "0,2"]),
        ("limbeck eval --measure agreement,re", ["agreement,recall"]),
        ("limbeck study paper-exp", ["paper-experiment-1"]),
        ("limbeck export --to q", ["qwen3_5"]),
    ],
)
def test_the_shell_completes_names(line, words):
    environment = {"_LIMBECK_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": line}
    code = "import sys; sys.argv = ['limbeck']; from limbeck.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert all(f'"{word}"' in done.stdout for word in words), done.stdout + done.stderr


def test_completion_offers_what_exists_and_nothing_twice():
    assert set(completion.complete_recipes("")) >= {path.stem for path in BUILT_IN.glob("*.yaml")}
    assert completion.complete_list(["gla", "kda"], "gla,") == ["gla,kda"]
    assert "paper-v3" in completion.complete_mixer_sets("paper")


def test_export_formats_that_are_completed_are_those_that_there_are():
    from limbeck.models import export

    assert set(completion.EXPORT_FORMATS) == set(export.EXPORTER_MODULES)


def test_a_verb_takes_the_common_options_from_one_place():
    """No verb declares --json, --quiet or a count of its own."""
    for name in VERBS:
        tree = ast.parse((CLI / f"{name}.py").read_text(encoding="utf-8"))
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not words & {"--json", "--quiet", "-q"}, name
