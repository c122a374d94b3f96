"""Students in other libraries' hands: what they are called, what their caches hold, what may be put around them."""

import copy
import pickle
import subprocess
import warnings
from functools import partial

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache, pipeline
from transformers.models.auto import modeling_auto

import limbeck
from helpers.paths import ROOT
from limbeck import LimbeckError, mixers
from limbeck.evaluation.timing import measure_cache_sizes
from limbeck.models import build_cache_kwargs, get_mixers
from limbeck.testing import MixerVariant, make_tiny_model
from limbeck.testing.contract import sample_ids

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)  # some families compute softmax in float32
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
IDS = sample_ids(1, 20)
hybrids = pytest.mark.parametrize("layers", ["all", [0], [1]])
families = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])


def filled(model, ids=IDS):
    """A cache that the model has read these ids into."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **build_cache_kwargs(model, cache))
    return cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hybrid on disk."""
    path = tmp_path_factory.mktemp("student")
    MixerVariant("gated_deltanet").build_student("llama", torch.float32, layers=[0]).save_pretrained(path)
    return path


# what a student is called


def test_a_converted_student_is_not_called_after_its_teacher(teacher_folder, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    student = limbeck.convert(teacher)
    for which in (student, copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        for name in (which.name_or_path, which.config._name_or_path):
            with pytest.raises(OSError, match="converted student in memory"):
                AutoModelForCausalLM.from_pretrained(name)
    assert teacher.name_or_path == str(teacher_folder)
    student.save_pretrained(tmp_path / "one")
    assert student.name_or_path == student.config._name_or_path == str(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(student.name_or_path)
    assert torch.equal(again(IDS).logits, student(IDS).logits)
    again.save_pretrained(tmp_path / "two")
    assert again.name_or_path == str(tmp_path / "two")


def test_an_adapter_of_a_student_never_lands_on_its_teacher(teacher_folder, tmp_path):
    peft = pytest.importorskip("peft")
    student = limbeck.convert(AutoModelForCausalLM.from_pretrained(teacher_folder))
    lora = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["mixer"], "task_type": "CAUSAL_LM"}
    peft.get_peft_model(copy.deepcopy(student), peft.LoraConfig(**lora)).save_pretrained(tmp_path / "lost")
    with pytest.raises(OSError, match="converted student in memory"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lost")
    with pytest.raises(LimbeckError, match="never saved"):
        student.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(LimbeckError, match="never saved"):
        student.load_adapter(str(tmp_path / "lost"))
    student.save_pretrained(tmp_path / "student")
    model = peft.get_peft_model(student, peft.LoraConfig(**lora))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(again.base_model.model) is type(student)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_an_adapter_beside_a_student_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    student = limbeck.convert(make_tiny_model("llama"), "gla")
    student.save_pretrained(tmp_path)
    model = peft.get_peft_model(student, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    for what in (str(tmp_path), tmp_path):
        with pytest.raises(LimbeckError, match=r"an adapter lies beside(.|\n)*try: rm .*otherwise: mkdir") as refused:
            AutoModelForCausalLM.from_pretrained(what)
    subprocess.run(refused.value.hint.split("otherwise: ")[1], shell=True, check=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    both = peft.PeftModel.from_pretrained(again, f"{tmp_path}-adapter")
    assert torch.equal(both(IDS).logits, model(IDS).logits)


# what a cache holds


@families
@hybrids
@torch.no_grad()
def test_a_cache_made_of_keys_and_values_is_refused(family, layers):
    model = MixerVariant("gated_deltanet").build_student(family, layers=layers)
    cache = filled(model, IDS[:, :10])
    pairs = [(k, v) for k, v, *_ in cache]
    by_hand = DynamicCache()
    for index, (key, value) in enumerate(pairs):
        by_hand.update(key, value, index)
    kept = DynamicCache(config=model.config)  # the softmax layers' own, and nothing of the others
    for index, layer in enumerate(cache.layers):
        if layers != "all" and index not in layers:
            kept.layers[index] = layer
    rebuilt = [DynamicCache(pairs), by_hand, DynamicCache(pairs, config=model.config), *([kept] * (layers != "all"))]
    for again in rebuilt:
        with pytest.raises(LimbeckError, match=r"hold no state|filled in part"):
            model(IDS[:, 10:], past_key_values=again)
    with pytest.raises(LimbeckError, match="hold no state"):
        model.generate(IDS, past_key_values=DynamicCache(pairs), **GREEDY)
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        got = model(IDS[:, 10:], past_key_values=copied).logits
        close(got, model(IDS).logits[:, 10:])


@torch.no_grad()
def test_states_without_the_softmax_layers_beside_them_are_refused():
    model = MixerVariant("gla").build_student("llama", layers=[0])
    cache, other = filled(model, IDS[:, :10]), filled(model, IDS[:, :6])
    fresh = DynamicCache(config=model.config)
    for layer in (fresh.layers[1], other.layers[1]):
        mixed = copy.deepcopy(cache)
        mixed.layers[1] = layer
        with pytest.raises(LimbeckError, match="filled in part"):
            model(IDS[:, 10:], past_key_values=mixed)


@torch.no_grad()
def test_a_cache_of_another_model_is_refused():
    ours = MixerVariant("retnet").build_student("llama")
    others = [
        MixerVariant("gla").build_student("llama"),
        MixerVariant("linear_attention").build_student("llama"),  # no parameters of its own either
        MixerVariant("retnet", {"conv": 4}).build_student("llama"),
        limbeck.convert(make_tiny_model("llama", seed=1).double(), "retnet"),
    ]
    for other in others:
        with pytest.raises(LimbeckError, match="another student"):
            ours(IDS, past_key_values=filled(other))
    hybrid = MixerVariant("retnet").build_student("llama", layers=[1])
    for layers, other in (
        ("softmax", make_tiny_model("llama").double()),
        ("other layers", MixerVariant("retnet").build_student("llama", layers=[0])),
    ):
        for model in (ours, hybrid):
            with pytest.raises(LimbeckError, match=r"already holds|hold no state|filled in part|looks for keys"):
                model(IDS, past_key_values=filled(other)), layers
    with pytest.raises(LimbeckError, match="looks for keys and values"):
        make_tiny_model("llama").double()(IDS, past_key_values=filled(ours))
    same = copy.deepcopy(ours)  # equal weights: the same student
    got = same(IDS[:, 10:], past_key_values=filled(ours, IDS[:, :10])).logits
    close(got, ours(IDS).logits[:, 10:])


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mlstm", "sliding_window"])
@torch.no_grad()
def test_several_answers_from_one_prefix(mixer):
    model = MixerVariant(mixer).build_student("llama")
    for more in ({"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}):
        cache = filled(model, IDS[:, :12])
        with pytest.raises(LimbeckError, match=r"holds 1 sequence, the call has 3(.|\n)*batch_repeat_interleave\(3\)"):
            model.generate(IDS, past_key_values=cache, **{**GREEDY, **more})
        cache = filled(model, IDS[:, :12])
        cache.batch_repeat_interleave(3)  # as the message says
        said = []
        for given in ({"past_key_values": cache}, {}):
            torch.manual_seed(0)
            said.append(model.generate(IDS, **given, **{**GREEDY, **more}))
        assert torch.equal(*said)
    with pytest.raises(LimbeckError, match="holds 2 sequences, the call has 3"):
        model(sample_ids(3, 4), past_key_values=filled(model, sample_ids(2, 4)))


@torch.no_grad()
def test_a_prompt_no_longer_than_its_cache_is_refused():
    model = MixerVariant("gated_deltanet").build_student("llama")
    embedded = model.get_input_embeddings()(IDS[:, :12])
    for given in ({"input_ids": IDS[:, :12]}, {"inputs": IDS}, {"inputs_embeds": embedded}):
        with pytest.raises(LimbeckError, match="has read 20 already"):
            model.generate(**given, past_key_values=filled(model), **GREEDY)
    static = StaticCache(config=model.config, max_cache_len=64)
    model(IDS, past_key_values=static, use_cache=True)
    with pytest.raises(LimbeckError, match="has read 20 already"):
        model.generate(IDS[:, :5], past_key_values=static, **GREEDY)
    assert torch.equal(
        model.generate(IDS, past_key_values=filled(model, IDS[:, :19]), **GREEDY), model.generate(IDS, **GREEDY)
    )


@torch.no_grad()
def test_layers_that_read_the_keys_of_others_read_the_whole_prompt():
    """Gemma 4 runs such layers on the last token of a prompt alone; one with a mixer would know nothing of the rest."""
    from limbeck.testing.student_checks import make_student
    from limbeck.testing.tiny_models import make_survey_model as tiny_of

    family = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    if not hasattr(family.Gemma4TextModel, "_maybe_slice_kv_shared_inputs"):
        pytest.skip("this transformers leaves nothing out")
    model, ids = make_student(tiny_of("gemma4_text").eval(), "gla"), IDS % 60 + 7
    said = ids
    for _ in range(4):
        said = torch.cat([said, model(said, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, **GREEDY), said)


# packed rows


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral"])
@hybrids
@torch.no_grad()
def test_documents_in_one_row_are_kept_apart(family, layers):
    model = MixerVariant("gated_deltanet").build_student(family, layers=layers)
    positions = torch.cat([torch.arange(8), torch.arange(1), torch.arange(11)])[None]
    alone = torch.cat([model(IDS[:, a:b]).logits for a, b in ((0, 8), (8, 9), (9, 20))], 1)
    ends = torch.tensor([0, 8, 9, 20], dtype=torch.int32)
    numbers = torch.tensor([[0] * 8 + [1] + [2] * 11])
    told = ({}, {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 11, "max_length_k": 11})
    for more in (*told, {"seq_idx": numbers}):
        for given in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(IDS)}):
            out = model(IDS, position_ids=positions, **given, **more)
            close(out.logits, alone)
        if more:
            close(model(IDS, **more).logits, alone)
    two = model(IDS.repeat(2, 1), position_ids=torch.cat([positions, torch.arange(20)[None]])).logits
    close(two, torch.cat([alone, model(IDS).logits]))


@torch.no_grad()
def test_packed_rows_that_cannot_be_read_are_refused():
    model = MixerVariant("gla").build_student("llama")
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    mask = torch.ones_like(IDS)
    mask[:, -2:] = 0
    for given, what in (
        ({"past_key_values": filled(model)}, "cannot fill a cache"),
        ({"past_key_values": DynamicCache(config=model.config)}, "cannot fill a cache"),
        ({"use_cache": True}, "cannot fill a cache"),
        ({"attention_mask": mask}, "padding"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 20])}, "other tokens"),
        ({"seq_idx": torch.zeros_like(IDS)}, "other tokens"),
    ):
        with pytest.raises(LimbeckError, match=what):
            model(IDS, position_ids=positions, **given)
    with pytest.raises(LimbeckError, match="does not separate documents by their positions"):
        MixerVariant("gla").build_student("opt")(IDS, position_ids=positions)
    left = torch.ones_like(IDS)
    left[:, :4] = 0
    padded = model(IDS, attention_mask=left, position_ids=(left.cumsum(1) - 1).clamp(min=0)).logits[:, 4:]
    close(padded, model(IDS[:, 4:]).logits)


# attention weights and implementations


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
@torch.no_grad()
def test_attention_weights_stand_in_their_layers_places(family, tmp_path):
    teacher = make_tiny_model(family).double()
    assert MixerVariant("gla").build_student(family)(IDS, output_attentions=True).attentions == (None, None)
    for layer in (0, 1):
        student = limbeck.convert(teacher, "gla", layers=[layer])
        plain = student(IDS).logits
        out = student(IDS, output_attentions=True)
        close(out.logits, plain)
        assert [weights is None for weights in out.attentions] == [i == layer for i in (0, 1)]
        student.save_pretrained(tmp_path / str(layer))
        eager = AutoModelForCausalLM.from_pretrained(tmp_path / str(layer), attn_implementation="eager")
        close(eager(IDS, output_attentions=True).attentions[1 - layer], out.attentions[1 - layer])
        said = student.generate(IDS, output_attentions=True, return_dict_in_generate=True, **GREEDY)
        kept = [step[1 - layer].dim() for step in said.attentions if step[layer] is None]
        assert kept == [4] * GREEDY["max_new_tokens"]
    teacher.set_attn_implementation("eager")
    expected = teacher(IDS, output_attentions=True).attentions[0]
    first_kept = limbeck.convert(teacher, "gla", layers=[1])
    close(first_kept(IDS, output_attentions=True).attentions[0], expected)
    first_kept.config.output_attentions = True
    close(first_kept(IDS).attentions[0], expected)


@torch.no_grad()
def test_an_attention_implementation_is_honoured_or_refused(folder):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name, own in (("sdpa", "limbeck"), ("eager", "limbeck_eager")):
        asked = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)
        assert asked.config._attn_implementation == own
        assert len(get_mixers(asked)) == 1
        plain.set_attn_implementation(name)
        assert plain.config._attn_implementation == own
        close(asked(IDS).logits, plain(IDS).logits)
        fresh = AutoModelForCausalLM.from_config(plain.config, attn_implementation=name)
        assert fresh.config._attn_implementation == own
    for name in ("flash_attention_2", "flex_attention", "paged|sdpa"):
        with pytest.raises(LimbeckError, match="would drop"):
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)
        with pytest.raises(LimbeckError, match="would drop"):
            plain.set_attn_implementation(name)
    with pytest.raises(LimbeckError, match="none of its layers keeps softmax"):
        limbeck.convert(make_tiny_model("llama")).set_attn_implementation("eager")


# what else is asked of a student


def test_continuous_batching_is_refused_by_every_entrance(folder):
    student = AutoModelForCausalLM.from_pretrained(folder)
    settings = GenerationConfig(max_new_tokens=2, eos_token_id=1, pad_token_id=0)
    for ask in (
        lambda: student.generate_batch([[3, 4, 5], [6, 7]], generation_config=settings),
        lambda: student.init_continuous_batching(generation_config=settings),
        lambda: student.continuous_batching_context_manager(generation_config=settings),
        lambda: student.generate(IDS, cache_implementation="paged"),
    ):
        with pytest.raises(LimbeckError, match="continuous batching"):
            ask()


def test_other_heads_are_refused_by_every_auto_class(folder, tokenizer):
    config = AutoModelForCausalLM.from_pretrained(folder).config
    names = (
        "SequenceClassification",
        "TokenClassification",
        "QuestionAnswering",
        "MaskedLM",
        "Seq2SeqLM",
        "TextEncoding",
    )
    for auto in (AutoModel, *(getattr(modeling_auto, f"AutoModelFor{name}") for name in names)):
        for ask in (lambda: auto.from_pretrained(folder), lambda: auto.from_config(config)):  # noqa: B023
            with pytest.raises(LimbeckError, match=rf"{auto.__name__} (.|\n)*base_model"):
                ask()
    for task in ("feature-extraction", "text-classification", "fill-mask"):
        with pytest.raises(LimbeckError, match="base_model"):
            pipeline(task, model=str(folder), tokenizer=tokenizer)


def test_a_body_is_not_saved_alone(folder, tmp_path):
    student = AutoModelForCausalLM.from_pretrained(folder)
    for model in (student, copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        with pytest.raises(LimbeckError, match="without its head"):
            model.base_model.save_pretrained(tmp_path / "body")
        assert not (tmp_path / "body").exists()
    student.save_pretrained(tmp_path / "whole")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(IDS).logits, student(IDS).logits)


MIXERS = [name for name in mixers.list_mixers() if mixers.get(name).__module__.startswith("limbeck.")]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("bits", [4, 8])
def test_mixers_and_head_stay_in_float_in_few_bits(bits, tmp_path):
    """Every mixer, heads whose number is no multiple of 32; a list of the caller's own is kept."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    few = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    teacher = make_tiny_model("llama", hidden_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=2)
    for name in MIXERS:
        student = limbeck.convert(teacher, name)
        student.save_pretrained(tmp_path / name)
        small = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, quantization_config=few, device_map={"": "cpu"}, dtype=torch.float32
        )
        rounded = [n for n, m in small.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]
        assert any(n.endswith("q_proj") for n in rounded)
        assert not [n for n in rounded if ".mixer." in n or n == "lm_head"], f"{name}: {rounded}"
        small.generate(IDS, **GREEDY)
    given = copy.deepcopy(few)
    given.llm_int8_skip_modules = ["lm_head", "model.layers.0.mlp.up_proj"]
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "gla", quantization_config=given, device_map={"": "cpu"})
    assert type(small.model.layers[0].mlp.up_proj) is torch.nn.Linear
    kinds = {type(m).__name__ for m in small.model.layers[0].self_attn.mixer.modules()}
    assert not kinds & {"Linear4bit", "Linear8bitLt"}
    assert given.llm_int8_skip_modules == ["lm_head", "model.layers.0.mlp.up_proj"], "the caller's object was changed"


# deployment


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def test_a_trace_is_refused_and_an_export_of_fixed_shape_works():
    model = MixerVariant("gated_deltanet").build_student("llama")
    with pytest.raises(LimbeckError, match=r"torch\.export"):
        torch.jit.trace(Logits(model), (IDS,), check_trace=False)
    exported = torch.export.export(Logits(model), (IDS,)).module()
    other = IDS.flip(1)
    close(exported(other), model(other).logits)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["all", [0]])
@torch.no_grad()
def test_a_step_is_exported_as_the_documents_say(layers):
    page = (ROOT / "docs" / "guides" / "generation.md").read_text(encoding="utf-8")
    code = page.split("## Export")[1].split("```python")[1].split("```")[0]
    student = MixerVariant("gated_deltanet").build_student("llama", layers=layers)
    scope = {"torch": torch, "StaticCache": StaticCache, "student": student, "prompt": IDS[:, :10]}
    exec(code.replace("512", "32"), scope)
    run, expected = scope["program"].module(), student(IDS, use_cache=False).logits
    for index in range(10, 20):
        close(run(IDS[:, index : index + 1], torch.tensor([[index]]))[:, -1], expected[:, index])


def test_transformers_exporter_says_what_to_do_instead():
    executorch = pytest.importorskip("transformers.integrations.executorch")
    model = limbeck.convert(make_tiny_model("llama"))
    model.generation_config.cache_implementation, model.generation_config.use_cache = "static", True
    module = executorch.TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=32, device="cpu")
    for strict, error in ((None, Exception), (True, Exception), (False, LimbeckError)):
        with pytest.raises(error, match=r"run a first pass that fills the cache(.|\n)*docs/guides/generation\.md"):
            module.export(input_ids=IDS[:, :1], cache_position=torch.tensor([0]), strict=strict)


def test_a_cache_goes_under_the_name_that_a_model_takes():
    model = limbeck.convert(make_tiny_model("llama"), layers=[0])
    cache = DynamicCache(config=model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for part in (model, model.get_decoder()):
            part(IDS, **build_cache_kwargs(part, cache))
        sizes = measure_cache_sizes(make_tiny_model("llama"), model, length=16)
    assert cache.get_seq_length() == 40
    assert sizes["student_bytes_per_token"] == sizes["teacher_bytes_per_token"] / 2
