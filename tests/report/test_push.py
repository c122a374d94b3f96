"""limbeck push: the card, what is sent and what is not, and a hub on this machine that receives it."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import _http
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import limbeck
from helpers.hub_server import TOKEN, serve
from limbeck import LimbeckError
from limbeck.cli import main
from limbeck.core.recipe import Recipe
from limbeck.report import privacy, upload_plan
from limbeck.report.model_card import PublishedRun, assemble_model_card, generate_model_card
from limbeck.report.teacher_info import EMBEDDED_TEACHER, TeacherInfo, resolve_teacher_info
from limbeck.report.upload import push_to_hub
from limbeck.report.upload_plan import plan_upload
from limbeck.testing import make_tiny_model
from limbeck.training import pipeline

SECRET = "annabelle"  # stands for a user's name in the paths of everything here


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher_folder, corpus) -> Path:
    """A finished run whose paths all have a user's name in them; its teacher's card states a licence."""
    home = tmp_path_factory.mktemp("home") / SECRET
    shutil.copytree(teacher_folder, home / "models" / "tiny-llama")
    (home / "models/tiny-llama/README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: en\n---\n# Tiny\n", encoding="utf-8"
    )
    (home / "models/tiny-llama/NOTICE").write_text("Made by nobody.\n", encoding="utf-8")
    shutil.copy(corpus, home / "corpus.jsonl")
    recipe = Recipe.parse(
        {
            "name": "tiny",
            "teacher": str(home / "models" / "tiny-llama"),
            "student": {"mixer": "gated_deltanet", "rules": [{"layers": "1", "mixer": "gla"}]},
            "data": {"source": str(home / "corpus.jsonl"), "seq_len": 32, "held_out": 0.2},
            "stages": [
                {"stage": "calibrate", "tokens": 512},
                {"stage": "hidden", "tokens": 512},
                {"stage": "logits", "tokens": 256, "lr": 0.002},
            ],
            "evaluation": {"tokens": 256, "prompt": "the work", "new_tokens": 4},
            "out": str(home / "runs" / "tiny"),
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(home / "cache"))
        pipeline.distill(recipe)
    return home / "runs" / "tiny"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the run that a test may change."""
    home = tmp_path / SECRET
    shutil.copytree(finished, home / "tiny")
    return home / "tiny"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, a token for it, and no xet in between."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        yield server


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """`limbeck push ...` in this process: exit code, stdout, stderr."""
    monkeypatch.setattr("sys.argv", ["limbeck", "push", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


# ---------------------------------------------------------------------- the card


def test_the_card_says_what_the_run_says(finished):
    made = plan_upload(finished, "ann/tiny")
    facts = ModelCard(made.model_card).data.to_dict()
    assert facts["license"] == "apache-2.0"
    assert facts["language"] == ["en"]
    assert facts["library_name"] == "transformers"
    assert facts["pipeline_tag"] == "text-generation"
    assert {"limbeck", "gated_deltanet", "gla", "subquadratic"} <= set(facts["tags"])
    assert "base_model" not in facts, "a local folder is no model of the hub"
    assert "datasets" not in facts
    result, manifest = (
        json.loads((finished / name).read_text(encoding="utf-8")) for name in ("eval.json", "manifest.json")
    )
    held = result["held_out"]
    for number in (
        f"| {held['teacher_perplexity']:.2f} | **{held['student_perplexity']:.2f}** |",
        f"{100 * held['top1_agreement']:.1f} %",
        f"{held['kl']:.3f}",
        f"{held['targets']:,} tokens",
        f"{result['stages'][2]['first_loss']:.3f} | {result['stages'][2]['loss']:.3f}",
        f"limbeck {manifest['limbeck']}, torch {manifest['torch']}, transformers {manifest['transformers']}",
        "| logits | body | 256 | 0.002 |",
        "| 0 | `gated_deltanet` |",
        "| 1 | `gla` |",
        "2504.14366",
        "2412.06464",
        "2312.06635",
        "limbeck eval student",
    ):
        assert number in made.model_card, number
    text = re.search(r"```yaml\n(.*?)\n```\n\n</details>", made.model_card, re.S)[1]
    recipe = Recipe.parse(yaml.safe_load(text))
    known = Recipe.load(finished / "recipe.yaml")
    assert recipe.stages == known.stages
    assert recipe.student == known.student
    assert (recipe.teacher, recipe.data.source, recipe.out) == ("tiny-llama", "corpus.jsonl", None)


def test_a_teacher_and_a_text_on_the_hub_are_linked(finished):
    plan = json.loads((finished / "student/config.json").read_text(encoding="utf-8"))["limbeck"]
    recipe = Recipe.load(finished / "recipe.yaml", {"data.source": "owner/text:en@train[:5%]"}).model_dump(mode="json")
    recipe["student"]["copy_projections"] = False
    result, manifest = (
        json.loads((finished / name).read_text(encoding="utf-8")) for name in ("eval.json", "manifest.json")
    )
    teacher_info = TeacherInfo("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", {"license": "apache-2.0"})
    text = generate_model_card("ann/qwen", plan, teacher_info, PublishedRun(recipe, result, manifest))
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.language) == ("Qwen/Qwen3-0.6B", ["owner/text"], None)
    assert "initialized at random" in text
    with pytest.raises(LimbeckError, match="cannot be read back"):
        assemble_model_card({"license": "mit", "tags": ["a", "a"]}, "text")


def test_nothing_names_this_machine(finished):
    made = plan_upload(finished, "ann/tiny")
    platform = json.loads((finished / "manifest.json").read_text(encoding="utf-8"))["platform"]
    hidden = [SECRET, str(finished.parents[3]), f"{Path.home()}/", platform]
    for item in made.files:
        raw = item.content if isinstance(item.content, bytes) else item.content.read_bytes()
        for word in hidden:
            assert word.encode() not in raw, f"{item.path_in_repo} says {word}"
    assert not any(word in made.commit_message for word in hidden)
    assert SECRET in (finished / "recipe.yaml").read_text(encoding="utf-8"), "else this test proves nothing"


def test_paths_in_settings_are_cut_and_in_code_refused(run):
    config = run / "student" / "tokenizer_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text(encoding="utf-8")), "name_or_path": str(run / "base"), "slash": "/"}),
        encoding="utf-8",
    )
    sent = {item.path_in_repo: item.content for item in plan_upload(run, "ann/tiny").files}
    assert json.loads(sent["tokenizer_config.json"])["name_or_path"] == "base"
    assert json.loads(sent["tokenizer_config.json"])["slash"] == "/"
    with open(run / "student" / "modeling_limbeck.py", "a", encoding="utf-8") as file:
        file.write(f"# {run.resolve()}/x\n")
    with pytest.raises(LimbeckError, match=r"modeling_limbeck\.py names the local folder"):
        plan_upload(run, "ann/tiny")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/ann/models/llama", "llama"),
        ("~/models/llama", "llama"),
        ("C:\\Users\\ann\\llama", "llama"),
        ("../ann/mine.py:Mixer", "mine.py:Mixer"),
        ("/home/ann/data@train", "data@train"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("embedded:pypi", "embedded:pypi"),
        ("/", "/"),
        ("/s", "/s"),
        ("every 4", "every 4"),
    ],
)
def test_local_paths_keep_their_last_part_only(text, left):
    assert privacy.strip_local_paths({"a": [text]}) == {"a": [left]}


def test_a_student_without_a_run(tmp_path, tokenizer):
    folder = tmp_path / "converted"
    limbeck.convert(make_tiny_model("llama"), "retnet", [1]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(LimbeckError, match="teacher's license"):
        plan_upload(folder, "ann/converted")
    made = plan_upload(folder, "ann/converted", license="mit")
    assert "no results" in made.model_card
    assert "## Results" not in made.model_card
    assert "| 0 | softmax | the teacher's own attention |" in made.model_card
    assert "| 1 | `retnet` |" in made.model_card
    assert "subquadratic" not in ModelCard(made.model_card).data.tags, "a layer is softmax"
    assert "family llama" in made.model_card


def test_a_card_of_the_users_own_is_sent_as_it_is(run):
    own = "---\nlicense: mit\n---\n# My words\n"
    (run / "student" / "README.md").write_text(own, encoding="utf-8")
    made = plan_upload(run, "ann/tiny")
    assert made.model_card == own
    assert next(item for item in made.files if item.path_in_repo == "README.md").content == own.encode()
    for wrong, word in (("# no metadata\n", "states no license"), ("---\nlicense: [\n---\n", "cannot be read")):
        (run / "student" / "README.md").write_text(wrong, encoding="utf-8")
        with pytest.raises(LimbeckError, match=word):
            plan_upload(run, "ann/tiny")


def test_a_card_with_a_mixer_of_ones_own_says_what_it_executes(finished):
    plan = json.loads((finished / "student/config.json").read_text(encoding="utf-8"))["limbeck"]
    plan["layers"][0] |= {"mixer": "mine", "options": {"a": 0.5, "b": "x|y"}}
    plan["origins"] = {"mine": {"file": "mine.py"}}
    card = generate_model_card("ann/mine", plan, EMBEDDED_TEACHER)
    assert "`trust_remote_code=True` is needed: it executes `mixer_mine.py`" in card
    assert "a=0.5, b=x\\|y" in card
    assert ModelCard(card).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


# ---------------------------------------------------------------------- licence


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: llama3.2\n---\n"}, {"license": "llama3.2"}),
        (
            {"README.md": "---\nlicense: other\nlicense_name: mine\nlicense_link: https://a.b\n---\n"},
            {"license": "other", "license_name": "mine", "license_link": "https://a.b"},
        ),
        ({"config.json": '{"license": "MIT"}'}, {"license": "mit"}),
        ({"LICENSE": "    Apache License\n   Version 2.0, January 2004\n"}, {"license": "apache-2.0"}),
        ({"LICENSE.txt": "MIT License\n\nCopyright"}, {"license": "mit"}),
        ({"LICENSE": "All rights reserved, but see the MIT License."}, None),
        ({"README.md": "---\nlicense: unknown\n---\n"}, None),
        ({"README.md": "---\nbroken: [\n---\n"}, None),
        ({}, None),
    ],
)
def test_the_licence_is_found_or_asked_for(tmp_path, files, licence):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    if licence is None:
        with pytest.raises(LimbeckError, match=r"--license apache-2\.0"):
            resolve_teacher_info(str(tmp_path))
    else:
        assert resolve_teacher_info(str(tmp_path)).license == licence
    assert resolve_teacher_info("/gone/away/llama", "mit").license == {"license": "mit"}


def test_a_licence_that_contradicts_the_teachers_is_told(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="cc-by-nc-4.0"):
        assert resolve_teacher_info(str(tmp_path), "mit").license == {"license": "mit"}
    with pytest.raises(LimbeckError, match="not a license identifier"):
        resolve_teacher_info(str(tmp_path), "My Licence")


def test_the_embedded_teacher_is_known():
    teacher_info = resolve_teacher_info("embedded")
    assert (teacher_info.repo_id, teacher_info.license) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        {"license": "apache-2.0"},
    )


def test_the_licence_of_a_teacher_on_the_hub(hub):
    hub.cards["meta/llama"] = {"license": "other", "license_name": "llama", "license_link": "LICENSE", "language": "no"}
    teacher_info = resolve_teacher_info("meta/llama")
    assert teacher_info.repo_id == "meta/llama"
    assert teacher_info.license["license_link"] == "https://huggingface.co/meta/llama/blob/main/LICENSE"
    assert teacher_info.languages == ["no"]
    with pytest.raises(LimbeckError, match="license"):
        resolve_teacher_info("meta/nothing")


def test_a_teacher_in_the_hubs_cache_has_its_name(tmp_path):
    folder = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    teacher_info = resolve_teacher_info(str(folder), "apache-2.0")
    assert teacher_info.repo_id == teacher_info.display_name == "Qwen/Qwen3-0.6B"


# ---------------------------------------------------------------------- dry run and checks


def test_the_dry_run_shows_all_and_writes_nothing(finished, monkeypatch, capsys, tmp_path):
    """Offline and without a token, as the tests' environment is."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("the dry run went to the network"))
    before = stamps(finished.parents[1])
    code, out, err = command(monkeypatch, capsys, finished, "ann/tiny", "--private", "--dry-run")
    assert code == 0, err
    assert stamps(finished.parents[1]) == before
    assert not list(tmp_path.iterdir())
    for word in ("ann/tiny (private)", "gated_deltanet and gla in 2 layers of tiny-llama", "## Limits"):
        assert word in out
    listed = re.findall(r"^ *([\d,]+)  (LFS|git) +([0-9a-f]{64})  (\S+)$", out, re.M)
    made = plan_upload(finished, "ann/tiny")
    assert [(i.size, i.sha256, i.path_in_repo) for i in made.files] == [
        (int(size.replace(",", "")), sha, name) for size, _, sha, name in listed
    ]
    assert {name for _, kind, _, name in listed if kind == "LFS"} == {"model.safetensors"}
    for _, _, sha, name in listed:
        if (finished / "student" / name).is_file():
            assert sha == hashlib.sha256((finished / "student" / name).read_bytes()).hexdigest()
    assert f"{len(listed)} files, {made.size:,} bytes" in out
    assert "NOTICE" in [name for *_, name in listed], "the teacher's notices go along"


def test_stray_files_stay_here(run):
    for name in (".env", "notes.py", "optimizer.pt", ".git/config", "mixer_other.py"):
        (run / "student" / name).parent.mkdir(exist_ok=True)
        (run / "student" / name).write_text("secret", encoding="utf-8")
    made = plan_upload(run, "ann/tiny")
    assert made.skipped_files == ["mixer_other.py", "notes.py", "optimizer.pt"]
    assert not {".env", ".git/config", *made.skipped_files} & {item.path_in_repo for item in made.files}


@pytest.mark.parametrize("name", ["a/b/c", "a b", "-a/b", "a/b--c", "ann/", "ann/x.git", "ann/" + "x" * 100])
def test_an_invalid_name_is_refused(finished, name):
    with pytest.raises(LimbeckError, match="not a valid repository name"):
        plan_upload(finished, name)


def test_an_unfinished_run_is_refused(run):
    result = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    (run / "eval.json").write_text(json.dumps({**result, "stages": result["stages"][:2]}), encoding="utf-8")
    with pytest.raises(LimbeckError, match="is not finished"):
        plan_upload(run, "ann/tiny")
    (run / "eval.json").unlink()
    with pytest.raises(LimbeckError, match="is not finished") as error:
        plan_upload(run, "ann/tiny")
    assert "limbeck distill" in error.value.hint
    with pytest.raises(LimbeckError, match="is not finished"):
        plan_upload(run / "student", "ann/tiny")
    shutil.rmtree(run / "student")
    with pytest.raises(LimbeckError, match="has no student yet"):
        plan_upload(run, "ann/tiny")


def test_what_is_no_student_is_refused(tmp_path, teacher_folder):
    with pytest.raises(LimbeckError, match="type 'llama', not a student"):
        plan_upload(teacher_folder, "ann/tiny")
    with pytest.raises(LimbeckError, match="holds no student"):
        plan_upload(tmp_path, "ann/tiny")


def test_a_folder_that_is_not_whole_is_refused(run):
    weights = run / "student" / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1])
    with pytest.raises(LimbeckError, match=f"has {len(raw) - 1:,} bytes"):
        plan_upload(run, "ann/tiny")
    weights.write_bytes(b"\xff" * 100)
    with pytest.raises(LimbeckError, match="truncated or damaged"):
        plan_upload(run, "ann/tiny")
    weights.unlink()
    with pytest.raises(LimbeckError, match="holds no weights"):
        plan_upload(run, "ann/tiny")
    weights.write_bytes(raw)
    for name in ("tokenizer_config.json", "modeling_limbeck.py"):
        (run / "student" / name).rename(run / "hidden")
        with pytest.raises(LimbeckError, match=r"tokenizer|modeling_limbeck\.py is missing"):
            plan_upload(run, "ann/tiny")
        (run / "hidden").rename(run / "student" / name)


@pytest.mark.parametrize("change", ["renamed", "missing", "reshaped", "not finite"])
def test_weights_that_loading_would_refuse_are_not_sent(run, change):
    file = run / "student" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "mixer" in name)
    tensor = weights.pop(name)
    if change == "renamed":
        weights[f"{name}_old"] = tensor
    elif change == "reshaped":
        weights[name] = tensor[None].clone()
    elif change == "not finite":
        weights[name] = tensor * float("nan")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(LimbeckError, match=re.escape(name)):
        plan_upload(run, "ann/x", license="mit")


def test_a_part_that_the_index_names_must_be_there(run):
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    (run / "student" / "model.safetensors").unlink()
    student.save_pretrained(run / "student", max_shard_size="50KB")
    parts = sorted((run / "student").glob("model-*.safetensors"))
    assert len(parts) > 1
    plan_upload(run, "ann/tiny")
    parts[1].unlink()
    with pytest.raises(LimbeckError, match=f"{parts[1].name} is missing"):
        plan_upload(run, "ann/tiny")


# ---------------------------------------------------------------------- pushes


def test_what_arrives_is_what_was_shown_and_can_be_loaded(finished, hub, monkeypatch, capsys, tmp_path):
    before = stamps(finished)
    code, _, err = command(monkeypatch, capsys, finished, "tiny", "--private", "--yes")  # a name of the token's owner
    assert code == 0, err
    assert f"{hub.address}/ann/tiny/commit/" in err
    assert stamps(finished) == before, "a push writes nothing here"
    repo = hub.repos["ann/tiny"]
    assert repo.private
    assert repo.commits == ["gated_deltanet and gla in 2 layers of tiny-llama"]
    made = plan_upload(finished, "ann/tiny")
    assert {item.path_in_repo: item.sha256 for item in made.files} == {
        name: hashlib.sha256(raw).hexdigest() for name, raw in repo.files.items()
    }
    for file in (finished / "student").iterdir():
        assert repo.files[file.name] == file.read_bytes(), file.name
    assert set(hub.blobs) == {hashlib.sha256(repo.files["model.safetensors"]).hexdigest()}
    received = tmp_path / "received"
    received.mkdir()
    for name, raw in repo.files.items():
        (received / name).write_bytes(raw)
    assert metadata_load(received / "README.md")["license"] == "apache-2.0"
    theirs, ours = (AutoModelForCausalLM.from_pretrained(f) for f in (received, finished / "student"))
    ids = AutoTokenizer.from_pretrained(received)("the work", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_a_second_push_of_the_same_changes_nothing(finished, hub):
    made = plan_upload(finished, "ann/tiny")
    push_to_hub(made)
    files, uploads = dict(hub.repos["ann/tiny"].files), hub.requests.count("upload")
    push_to_hub(made)
    assert hub.repos["ann/tiny"].files == files
    assert len(hub.repos["ann/tiny"].commits) == 1
    assert hub.requests.count("upload") == uploads == 1


def test_another_student_takes_the_place_of_the_first(run, hub):
    """Weights of the first that the second lacks would be loaded with it; what its user added stays."""
    push_to_hub(plan_upload(run, "ann/tiny"))
    hub.repos["ann/tiny"].files["picture.png"] = b"png"
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    (run / "student" / "model.safetensors").unlink()
    student.save_pretrained(run / "student", max_shard_size="50KB")
    made = plan_upload(run, "ann/tiny")
    push_to_hub(made)
    assert set(hub.repos["ann/tiny"].files) == {"picture.png", *(item.path_in_repo for item in made.files)}


def test_a_public_repository_gets_nothing_private(finished, hub):
    push_to_hub(plan_upload(finished, "ann/tiny"))
    assert hub.repos["ann/tiny"].private is False
    with pytest.raises(LimbeckError, match="exists and is public"):
        push_to_hub(plan_upload(finished, "ann/tiny", private=True))
    assert len(hub.repos["ann/tiny"].commits) == 1


def test_another_model_is_not_overwritten(finished, hub):
    push_to_hub(plan_upload(finished, "ann/other"))
    hub.repos["ann/other"].files["config.json"] = b'{"model_type": "llama"}'
    with pytest.raises(LimbeckError, match="not a student"):
        push_to_hub(plan_upload(finished, "ann/other"))


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize(
    ("route", "status", "words"),
    [
        ("create", 401, ["rejected the token", "hf auth login"]),
        ("create", 500, ["failed", "later"]),
        ("model", 404, ["has no ann/tiny"]),
        ("yaml", 400, ["refused the upload to ann/tiny"]),
        ("preupload", 403, ["cannot write to ann/tiny", "write access to ann"]),
        ("lfs", 500, ["failed"]),
        ("upload", 403, ["cannot write"]),
        ("upload", 500, ["failed", "not sent twice"]),
        ("commit", 403, ["cannot write"]),
        ("commit", 500, ["failed"]),
        ("commit", 429, ["too many requests"]),
        ("commit", 413, ["too large"]),
    ],
)
def test_every_refusal_of_the_hub_is_told(finished, hub, monkeypatch, capsys, route, status, words):
    hub.fail[route] = status
    code, _, err = command(monkeypatch, capsys, finished, "ann/tiny", "--yes")
    assert code == 2
    assert err.count("error:") == 1
    for word in words:
        assert re.search(word, err), err
    assert not hub.repos.get("ann/tiny") or not hub.repos["ann/tiny"].files, "half of it arrived"
    hub.fail.clear()
    code, _, err = command(monkeypatch, capsys, finished, "ann/tiny", "--yes")
    assert code == 0, err
    assert "README.md" in hub.repos["ann/tiny"].files


def test_what_the_hub_says_of_a_card_is_passed_on(finished, hub):
    with pytest.warns(UserWarning, match="nobody-knows"), pytest.raises(LimbeckError, match='"license" must be one of'):
        push_to_hub(plan_upload(finished, "ann/tiny", license="nobody-knows-it"))


def test_somebody_elses_namespace(finished, hub, monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys, finished, "bob/tiny", "--yes")
    assert code == 2
    assert "cannot write to bob/tiny" in err


def test_without_token_network_or_permission(finished, hub, monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys, finished, "ann/tiny")
    assert (code, "--yes" in err) == (2, True), "nobody can be asked here"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, err = command(monkeypatch, capsys, finished, "tiny", "--yes")
    assert (code, "rejected the token" in err) == (2, True), err
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = command(monkeypatch, capsys, finished, "ann/tiny", "--yes")
    assert (code, "hf auth login" in err) == (2, True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, _, err = command(monkeypatch, capsys, finished, "ann/tiny", "--yes", "--endpoint", "http://127.0.0.1:9")
    assert (code, "cannot reach" in err) == (2, True), err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = command(monkeypatch, capsys, finished, "ann/tiny", "--yes")
    assert (code, "HF_HUB_OFFLINE" in err) == (2, True)
    assert not hub.repos


def test_asked_before_sending(finished, hub, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, sent in ((False, False), (True, True)):
        monkeypatch.setattr("typer.confirm", lambda text, answer=answer: answer)
        code, out, _ = command(monkeypatch, capsys, finished, "ann/tiny")
        assert code == 0
        assert "ann/tiny (public)" in out
        assert ("ann/tiny" in hub.repos) is sent


def test_find_student_in_the_current_folder(finished, monkeypatch):
    monkeypatch.chdir(finished / "student")
    assert "## Results" in plan_upload(".", "ann/tiny").model_card
    assert upload_plan.find_student_folder(Path(".")).name == "student"


def test_the_sources_of_a_mixture_are_named_without_their_folders(run, tmp_path, corpus):
    """Its label holds one path for each source, none of them at its beginning."""
    secret = tmp_path / "secret-project" / "ann"
    secret.mkdir(parents=True)
    for name in ("confidential.jsonl", "second one.jsonl"):
        shutil.copy(corpus, secret / name)
    raw = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    sources = [{"source": str(secret / "confidential.jsonl"), "weight": 0.6}]
    sources.append({"source": str(secret / "second one.jsonl"), "weight": 0.4})
    raw["data"] = {**{k: v for k, v in raw["data"].items() if k not in ("source", "text_field", "chat")}}
    raw["data"]["sources"] = sources
    (run / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    card = plan_upload(run, "ann/x", license="mit").model_card
    assert "0.6 confidential.jsonl + 0.4 second one.jsonl" in card
    assert "secret-project" not in card
    label = Recipe.load(run / "recipe.yaml").data.source
    assert privacy.strip_local_paths({"text": label}) == {"text": "0.6 confidential.jsonl + 0.4 second one.jsonl"}


@pytest.mark.parametrize("label", ["0.5 embedded + 0.5 org/name", "3 apples and 4 pears", "1", "1 embedded"])
def test_labels_without_paths_stay_as_they_are(label):
    assert privacy.strip_local_paths(label) == label


@pytest.mark.parametrize("words", ["see {}", "cat {} | head", 'open("{}")', "({})."])
def test_a_prompt_that_names_a_place_is_refused_wherever_it_lies(run, tmp_path, words):
    place = tmp_path / "elsewhere" / "notes.txt"
    place.parent.mkdir()
    place.write_text("x", encoding="utf-8")
    raw = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    raw["evaluation"]["prompt"] = words.format(place)
    (run / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(LimbeckError, match="prompt names"):
        plan_upload(run, "ann/x", license="mit")


@pytest.mark.parametrize("text", ["and/or", "/s/ marks the end", "https://example.org/a/b", "1/2/3", "/no/such/place"])
def test_what_only_looks_like_a_place_is_no_place(text):
    assert privacy.find_local_paths(text) == []
