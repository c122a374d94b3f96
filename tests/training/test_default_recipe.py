"""The recipe of `limbeck distill` alone, `limbeck`, on a tiny teacher and the text of a command line."""

import json
from pathlib import Path

import pytest

from limbeck import LimbeckError, Recipe
from limbeck.cli import main
from limbeck.cli.distill import build_recipe
from limbeck.data.held_out import hash_document
from limbeck.training import recipe_options

pytestmark = pytest.mark.usefixtures("own_cache")
TINY = {
    "student.options": "{window: 8, sinks: 2}",
    "student.softmax_heads": "1",
    "student.softmax_window": "24",
    "data.seq_len": "32",
    "data.held_out": "0.2",
    "stages.0.seq_len": "96",
    "stages.0.tokens": "768",
    "evaluation": "{tokens: 128, prompt: null, new_tokens: 0}",
    "trackers": "[]",
}


@pytest.fixture(scope="module")
def paragraphs(corpus) -> list[str]:
    return [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def call(teacher_folder, tmp_path, monkeypatch, capsys):
    """Run `limbeck distill` on documents, in the sizes of `TINY`: (exit code, what it said, run directory)."""

    def run(documents: list[str], *arguments: str) -> tuple[int, str, Path]:
        text, out = tmp_path / "mine.jsonl", tmp_path / "run"
        text.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), encoding="utf-8")
        settings = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
        places = ["--teacher", str(teacher_folder), "--data", str(text), "--out", str(out)]
        monkeypatch.setattr("sys.argv", ["limbeck", "distill", *places, *settings, *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err, out

    return run


def test_a_text_of_the_command_line_is_read_everywhere():
    nothing = dict.fromkeys(("name", "teacher", "student", "layers", "stages", "tokens", "out"))
    made = build_recipe(**nothing, data="mine.jsonl", settings=[])
    default = Recipe.load()
    assert (made.name, made.student) == ("limbeck", default.student)
    (stage,), (before,) = made.stages, default.stages
    assert (made.data.source, made.data.max_tokens, stage.data.max_tokens) == ("mine.jsonl", None, None)
    assert [one.source for one in before.data.sources] == ["embedded", "repeated-text:embedded"]
    assert [one.source for one in stage.data.sources] == ["mine.jsonl", "repeated-text:mine.jsonl"]
    assert [one.weight for one in stage.data.sources] == [one.weight for one in before.data.sources]
    assert (stage.data.documents, stage.data.held_out) == ("whole", made.data.held_out)


def test_settings_of_the_text_reach_the_stage_that_reads_it():
    nothing = dict.fromkeys(("name", "teacher", "student", "layers", "stages", "tokens", "data", "out"))
    settings = ["data.source=mine.jsonl", "data.text_field=body", "data.held_out=0.3", "data.max_tokens=1000"]
    (stage,) = build_recipe(**nothing, settings=settings).stages
    assert [one.source for one in stage.data.sources] == ["mine.jsonl", "repeated-text:mine.jsonl"]
    assert {one.text_field for one in stage.data.sources} == {"body"}
    assert (stage.data.held_out, stage.data.max_tokens) == (0.3, 1000)
    settings = ["data.source=mine.jsonl", "stages.0.data.source=other.jsonl", "stages.0.data.sources=null"]
    (stage,) = build_recipe(**nothing, settings=settings).stages
    assert stage.data.source == "other.jsonl"
    (stage,) = build_recipe(**nothing, settings=["stages.0.data.source=other.jsonl"]).stages
    assert (stage.data.source, stage.data.sources) == ("other.jsonl", None)


def test_one_of_a_mixture_takes_the_place_of_one_text():
    base = Recipe.load()
    own = {"source": "embedded", "seq_len": 1024}
    base = Recipe.parse({**base.model_dump(mode="json"), "stages": [{"stage": "logits", "tokens": 4096, "data": own}]})
    for sources in ([{"source": "a.jsonl", "text_field": "body"}], [{"source": "a.jsonl"}, {"source": "b.jsonl"}]):
        made = recipe_options.build_recipe(base, overrides={"data.sources": sources})
        assert made.stages[0].data.seq_len == 1024
        assert [one.source for one in made.stages[0].data.sources] == [one["source"] for one in sources]
        assert made.stages[0].data.sources[0].text_field == sources[0].get("text_field", "text")


@pytest.mark.parametrize("data", [None, "elsewhere.jsonl"])
def test_several_texts_take_the_place_of_the_recipes_own_everywhere(data):
    nothing = dict.fromkeys(("name", "teacher", "student", "layers", "stages", "tokens", "out"))
    settings = ["data.sources=[{source: a.jsonl, weight: 3, text_field: body}, {source: b.jsonl}]"]
    made = build_recipe(**nothing, data=data, settings=settings)
    assert [(one.source, one.weight) for one in made.data.sources] == [("a.jsonl", 3), ("b.jsonl", 1)]
    read = [(one.source, one.weight, one.text_field) for one in made.stages[0].data.sources]
    assert read == [
        ("a.jsonl", 9 / 4, "body"),
        ("b.jsonl", 3 / 4, "text"),
        ("repeated-text:a.jsonl", 6 / 4, "body"),
        ("repeated-text:b.jsonl", 2 / 4, "text"),
    ]
    for wrong in ("{a: b}", "5", "[]", "[a]", "[{source: a.jsonl, weight: -1}]", "[{weight: 1}]"):
        with pytest.raises(LimbeckError, match=r"data\.sources"):
            build_recipe(**nothing, data=data, settings=[f"data.sources={wrong}"])


def test_the_length_of_a_sequence_holds_in_all_stages():
    """The default recipe's stage has a length of its own, which --seq-len means too."""
    nothing = dict.fromkeys(("name", "teacher", "student", "layers", "stages", "tokens", "data", "out"))
    made = build_recipe(**nothing, settings=[], seq_len=256)
    assert {made.data.seq_len, *(made.text_of(stage).seq_len for stage in made.stages)} == {256}
    assert made.stages[0].tokens == Recipe.load().stages[0].tokens
    with pytest.raises(LimbeckError, match="seq_len"):
        build_recipe(**nothing, settings=[], seq_len=3)


@pytest.mark.parametrize(("words", "name"), [({"student": "gla"}, "quickstart-gla"), ({"stages": "0,3"}, "quickstart")])
def test_a_mixer_or_stages_mean_the_quickstart(words, name):
    nothing = dict.fromkeys(("name", "teacher", "student", "layers", "stages", "tokens", "data", "out"))
    assert build_recipe(**{**nothing, **words}, settings=[]).name == name


def test_a_plan_on_an_own_text_writes_nothing(call, paragraphs, tmp_path):
    before = sorted(tmp_path.iterdir())
    code, said, out = call([" ".join(paragraphs[i : i + 4]) for i in range(len(paragraphs))], "--plan")
    assert code == 0, said
    assert "trained parameters" in said
    flat = " ".join(said.split())
    assert "would be chosen first, once: 1 of 4 groups of heads" in flat
    assert "mine.jsonl" in flat
    assert "embedded" not in flat
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / "mine.jsonl"]
    assert not out.exists()


def test_a_run_on_an_own_text(call, paragraphs):
    code, said, out = call([" ".join(paragraphs[i : i + 4]) for i in range(len(paragraphs))])
    assert code == 0, said
    texts = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["texts"]
    files = {name for text in texts.values() for name in text["files"]}
    assert files
    assert all("mine.jsonl" in name for name in files), files
    stored = Recipe.load(out / "recipe.yaml")
    assert "embedded" not in stored.data.source + stored.stages[0].data.source
    plan = json.loads((out / "student" / "config.json").read_text(encoding="utf-8"))["limbeck"]["layers"]
    assert sorted(layer["mixer"] for layer in plan) == ["head_split", "sliding_window"]
    (stage,) = json.loads((out / "eval.json").read_text(encoding="utf-8"))["stages"]
    assert stage["tokens"] == 768
    # of the student before and behind the stage the better one on held-out text is kept
    assert stage["guard"]["kept"] == (stage["guard"]["after"] <= stage["guard"]["before"])


@pytest.mark.parametrize("setting", ["student.softmax_layers=0", "student.layers=1", "stages.logits.ce=0.5"])
def test_one_more_setting_of_the_default_recipe(setting, call, paragraphs):
    """What docs/guides/hybrids.md and `limbeck select` say to type."""
    code, said, _ = call([" ".join(paragraphs)] * 3, "--set", setting, "--plan")
    assert code == 0, said
    assert "trained parameters" in said


def test_documents_shorter_than_the_sequences_are_refused_by_the_key_to_change(call, paragraphs):
    short = [one[:100] for one in paragraphs] * 8
    code, said, out = call(short)
    assert code == 2
    assert "no train document has 96 tokens" in said
    assert "--set stages.0.data.documents=packed" in said
    assert not out.exists()
    code, said, out = call(short, "--set", "stages.0.data.documents=packed")
    assert code == 0, said
    assert (out / "student" / "model.safetensors").is_file()


def test_held_out_documents_are_long_only_where_a_stage_reads_them(call, paragraphs):
    """Without a held-out loss in between, short ones do; with it, the run is refused before anything is written."""

    def is_held_out(text: str) -> bool:
        return hash_document(text.encode())[0] < 0.2 * 2**64

    long = [" ".join(paragraphs[i : i + 4]) for i in range(len(paragraphs))]
    documents = [text for text in long if not is_held_out(text)] + [
        text for i in range(40) if is_held_out(text := f"{i} {paragraphs[0][:120]}")
    ]
    code, said, out = call(documents, "--set", "stages.0.eval_steps=2")
    assert code == 2
    assert "no held out document has 96 tokens" in said
    assert "--set stages.0.data.documents=packed" in said
    assert not out.exists()
    code, said, out = call(documents)
    assert code == 0, said
    assert (out / "student" / "model.safetensors").is_file()
