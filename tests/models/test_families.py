"""What docs/reference/families.md says of transformers' families is what comes out when they are tried."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, T5Config, T5ForConditionalGeneration
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from typer.testing import CliRunner

import limbeck
from helpers.paths import ROOT
from limbeck import LimbeckError
from limbeck.models import RecurrentLayer, cache_bytes, find_attention_sites, get_mixers
from limbeck.models.attention import token_mask_from_attention_mask
from limbeck.testing import survey, tiny_models
from limbeck.testing.contract import left_pad
from limbeck.testing.student_checks import (
    GENERATION_KWARGS,
    PADDING,
    StudentChecks,
    make_random_ids,
    make_student,
)

DOCS = (ROOT / "docs" / "reference" / "families.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCS.splitlines() if line.startswith("| `")]
TABLE = {row[0].strip("`"): row[1:] for row in ROWS if len(row) == 5}
WALKS = 8
# one of each structure
SAMPLE = {
    "llama": "gla",
    "gpt2": "gated_deltanet",  # fused projections, learned positions
    "gpt_neox": "gla",  # names its cache otherwise
    "gpt_bigcode": "gla",  # one key head
    "bert": "gla",  # an encoder as a decoder
    "gemma2": "gated_deltanet",  # soft caps, windows
    "gemma3": "gla",  # text inside a multimodal model
    "gemma4_text": "gla",  # layers that read the keys of others
    "deepseek_v3": "gated_deltanet",  # latent attention, experts
    "deepseek_v32": "gla",  # an indexer that closes keys
    "gpt_oss": "gla",  # sinks
    "llama4_text": "gla",  # chunks
    "qwen3_next": "gated_deltanet",  # linear layers between
    "falcon_h1": "gla",  # and in the same layer
    "zamba2": "gla",  # one module at several depths, wider input than output
    "hrm_text": "gated_deltanet",  # several passes over the same layers
    "diffllama": "gla",  # two calls of the attention function a layer
    "mllama": "gla",  # cross-attention beside
    "bart": "gla",
    "bloom": "gla",
    "mamba": "gla",
}
as_documented = pytest.mark.skipif(
    transformers.__version__ not in DOCS,
    reason=f"docs/reference/families.md is not of transformers {transformers.__version__}",
)


def test_enough_families_work():
    counts = {status: sum(row[1] == status for row in TABLE.values()) for status in ("works", "partly", "no")}
    assert counts["works"] >= 140
    assert f"{counts['works']} work, {counts['partly']} work partly, {counts['no']} do not." in DOCS


@as_documented
def test_the_table_has_every_family():
    assert list(TABLE) == tiny_models.list_families()


@pytest.mark.fast_cases(5)
@as_documented
@pytest.mark.parametrize("family", SAMPLE)
def test_a_sample_is_as_documented(family):
    assert_documented(survey.survey_family(family, SAMPLE[family]))


@as_documented
@pytest.mark.slow
@pytest.mark.parametrize("part", range(WALKS))
def test_all_others_are_as_documented(part):
    others = [family for family in tiny_models.list_families() if family not in SAMPLE]
    for row in survey.survey_families(others[part::WALKS]):
        if "requires the" not in row.problem + TABLE[row.family][-1]:  # depends on what else is installed
            assert_documented(row)


def assert_documented(row: survey.FamilyResult) -> None:
    assert [row.architecture, row.status, ", ".join(row.features), row.problem] == TABLE[row.family]


def test_what_goes_wrong_is_one_line(monkeypatch):
    from limbeck.testing import survey

    monkeypatch.setattr(survey, "make_survey_model", lambda family: torch.zeros(2) @ torch.zeros(3))
    assert survey.survey_family("llama").problem.startswith("no tiny model can be made: RuntimeError: ")

    def forever(family):
        while True:
            pass

    monkeypatch.setattr(survey, "make_survey_model", forever)
    assert survey.survey_family("llama", seconds=0.2).problem == "takes more than 0 s at its tiniest"
    with pytest.raises(LimbeckError, match="did you mean 'llama'"):
        tiny_models.make_survey_model("lama")
    with pytest.raises(LimbeckError, match="unknown mixer"):
        survey.survey_family("llama", "softmin")


def test_the_command():
    from limbeck.cli import app
    from limbeck.cli import families as _  # noqa: F401

    done = CliRunner().invoke(app, ["families", "llama", "bloom", "--markdown"])
    assert done.exit_code == 0
    assert "1 work, 0 work partly, 1 do not." in done.stdout
    assert "| `bloom` | BloomForCausalLM | no |  | computes attention in code of its own |" in done.stdout
    done = CliRunner().invoke(app, ["families", "llama", "--mixer", "gla"])
    assert done.exit_code == 0
    assert "1 work, 0 partly, 0 do not; mixer gla" in done.stdout


# --------------------------------------------------------------- what the families need


def test_chunks_are_no_documents():
    mask = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool().tril()[None, None]
    assert token_mask_from_attention_mask(mask.clone(), 8).segments.tolist() == [[0] * 4 + [1] * 4]
    assert token_mask_from_attention_mask(mask.clone(), 8, chunk=4).segments is None
    going_on, restarting = torch.arange(8)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    assert token_mask_from_attention_mask(mask.clone(), 8, positions=going_on, chunk=4).segments is None
    assert token_mask_from_attention_mask(mask.clone(), 8, positions=restarting, chunk=4).segments.tolist() == [
        [0] * 4 + [1] * 4
    ]
    both = mask & torch.block_diag(torch.ones(3, 3), torch.ones(5, 5)).bool()
    assert token_mask_from_attention_mask(both, 8, chunk=4).segments.tolist() == [[0] * 3 + [1] * 5]
    padded_by_one = torch.zeros(9, 9).bool()
    padded_by_one[1:, 1:] = mask[0, 0]
    assert token_mask_from_attention_mask(padded_by_one[None, None], 9, chunk=4).segments is None


@torch.no_grad()
def test_packed_documents_in_a_family_with_chunks():
    student = make_student(tiny_models.make_survey_model("llama4_text").double(), "gla")
    ids = make_random_ids()
    positions = torch.cat([torch.arange(13), torch.arange(8)])[None].expand(2, -1)
    packed = student(ids, position_ids=positions, use_cache=False).logits
    assert torch.allclose(packed[:, :13], student(ids[:, :13], use_cache=False).logits, atol=1e-8)
    alone = student.model(ids[:, 13:], use_cache=False).last_hidden_state
    together = student.model(ids, position_ids=positions, use_cache=False).last_hidden_state[:, 13:]
    assert torch.allclose(together, alone, atol=1e-4)


def test_layers_that_read_what_is_gone_are_refused():
    teacher = tiny_models.make_survey_model("gemma4_text")
    with pytest.raises(LimbeckError, match="layer 2 would stay softmax and reads the keys and values of layer 0"):
        limbeck.convert(teacher, "gla", layers=[0])
    assert len(get_mixers(limbeck.convert(teacher, "gla", layers=[0, 2]))) == 2
    StudentChecks(teacher.double(), "gla", layers=[2]).steps()


def test_what_looks_ahead_is_refused():
    config = tiny_models.make_survey_model("bert").config
    config.is_decoder = False
    with pytest.raises(LimbeckError, match="BertLMHeadModel looks ahead"):
        find_attention_sites(AutoModelForCausalLM.from_config(config))


def test_an_encoder_beside_a_decoder_is_refused():
    config = T5Config(num_layers=1, d_model=16, d_ff=16, num_heads=2, d_kv=8, vocab_size=50)
    with pytest.raises(LimbeckError, match="T5ForConditionalGeneration is a sequence-to-sequence model"):
        limbeck.convert(T5ForConditionalGeneration(config), "gla")


@torch.no_grad()
def test_states_of_the_familys_own_stay_where_they_are():
    student = make_student(tiny_models.make_survey_model("falcon_h1"), "gla")
    cache = DynamicCache(config=student.config)
    student(make_random_ids(), past_key_values=cache, use_cache=True)
    layer = cache.layers[0]
    assert isinstance(layer, RecurrentLayer)
    assert isinstance(layer, LinearAttentionCacheLayerMixin)
    assert cache.get_seq_length() == make_random_ids().shape[1]
    held = cache_bytes(cache)
    assert held > sum(layer.nbytes() for layer in cache.layers) > 0
    student(make_random_ids(), past_key_values=cache, use_cache=True)
    assert cache_bytes(cache) == held
    cache.batch_repeat_interleave(2)
    assert all(len(s) == 4 for s in layer.read_state(0).values())
    cache.reset()
    assert cache.get_seq_length() == 0
    assert layer.read_state(0) is None
    assert not cache.has_previous_state()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "falcon_h1"])
@pytest.mark.parametrize("layers", ["all", [0], [1]])
def test_static_caches_and_beams(family, layers):
    student = make_student(tiny_models.make_survey_model(family), "gla", layers)
    inputs = left_pad(make_random_ids(length=17), PADDING)
    inputs.pop("position_ids")
    dynamic = student.generate(**inputs, **GENERATION_KWARGS)
    assert torch.equal(student.generate(**inputs, **GENERATION_KWARGS, cache_implementation="static"), dynamic)
    beams = student.generate(**inputs, **GENERATION_KWARGS, num_beams=3)
    alone = student.generate(make_random_ids(length=17)[1:], **GENERATION_KWARGS, num_beams=3)
    assert torch.equal(beams[1:], alone)


@torch.no_grad()
def test_a_family_without_sdpa_keeps_its_own_softmax():
    teacher = (
        tiny_models.make_survey_model("gpt_oss").double()
        if not torch.cuda.is_available()
        else tiny_models.make_survey_model("gpt_oss")
    )
    assert not type(teacher)._supports_sdpa
    student = limbeck.convert(teacher.float(), "softmax", layers=[1])
    assert student.config._attn_implementation == "limbeck_eager"
    ids = make_random_ids(1, 6)
    ours, theirs = {}, {}
    for model, seen in ((teacher, theirs), (student, ours)):
        block = model.model.layers[0].self_attn
        handle = block.register_forward_hook(lambda m, a, out, seen=seen: seen.update(y=out[0]))
        model(ids, use_cache=False)
        handle.remove()
    assert torch.allclose(ours["y"], theirs["y"], atol=1e-6)
