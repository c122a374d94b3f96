"""ONNX: the same logits in onnxruntime as prompt, step by step and padded; refusals; what the file holds."""

import importlib
import json
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import limbeck
from helpers.paths import ROOT
from helpers.scripts import load_script
from limbeck import LimbeckError
from limbeck.mixers import HeadShape, Tokens, build, list_mixers
from limbeck.models import export as exports
from limbeck.models import get_mixers
from limbeck.models.export import onnx as onnx_export
from limbeck.models.export.onnx_operators import attend_softmax, attend_window
from limbeck.models.export.onnx_step import StudentStep
from limbeck.models.export.record import write_export
from limbeck.testing import make_tiny_model
from limbeck.testing.tiny_models import make_survey_model

EXPORTER = exports.get_exporter("onnx")
EXACT = 1e-4  # a logit, in float32; the logits' standard deviation is about 0.6
LENGTH, PADDING = 40, 9
PIECES = (5, 1, 16, 18)  # tokens of each call


def runtime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def make_student(family: str, mixer: str, options: dict | None = None, **settings):
    """A student with the mixers' parameters away from their starts."""
    student = limbeck.convert(make_tiny_model(family), mixer, options=options or {}, **settings)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for mixer_module in get_mixers(student).values():
            for parameter in mixer_module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return student.eval()


def make_ids(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(0).integers(3, 97, (rows, length)))


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template="{{ messages[0]['content'] }}")


# ------------------------------------------------------------------ the same model in the engine

# family, mixer, options, layers that keep softmax
CASES = [
    ("llama", "gated_deltanet", {}, "none"),
    ("qwen3", "kda", {"conv": 4, "conv_activation": "silu", "output_norm": "rms", "output_gate": "sigmoid"}, "none"),
    ("qwen2", "deltanet", {"negative_eigenvalues": True}, "none"),
    ("mistral", "gla", {}, "none"),
    ("llama", "hgrn2", {"swish": True}, "none"),
    ("qwen2", "metala", {"augment": True}, "none"),
    ("qwen3", "retnet", {"heads": 3}, "none"),
    ("llama", "mamba2", {"conv": 4, "norm_over": "gated", "skip": 1.0}, "none"),
    ("gpt2", "hedgehog", {}, "none"),
    ("llama", "cosformer", {}, "none"),
    ("llama", "rwkv6", {"norm_bias": True, "output_norm": "layer"}, "none"),
    ("qwen3", "sliding_window", {"window": 8, "sinks": 2}, "none"),
    ("llama", "hybrid", {"window": 8, "sinks": 2}, "none"),
    ("gemma2", "gated_deltanet", {}, "0"),  # keeps the layer with a window of the family's own
    ("qwen2", "softmax", {}, "none"),
    ("qwen3", "sliding_window", {"window": 8, "sinks": 0}, "1"),
]
FAST = (12,)  # an export takes seconds; this one has a linear branch and a window


@pytest.mark.parametrize(
    ("family", "mixer", "options", "softmax_layers"),
    [pytest.param(*case, marks=[] if i in FAST else [pytest.mark.slow]) for i, case in enumerate(CASES)],
)
def test_onnxruntime_computes_the_student(tmp_path, family, mixer, options, softmax_layers):
    runtime()
    student = make_student(family, mixer, options, softmax_layers=softmax_layers)
    write_export(EXPORTER, student, None, tmp_path / "out")
    session = onnx_export.GraphSession(tmp_path / "out")
    ids = make_ids()
    with torch.no_grad():
        wanted = student(ids, use_cache=False).logits.numpy()

    prompt, _ = session.run(ids.tolist(), session.make_empty_states(2))
    assert np.abs(prompt - wanted).max() < EXACT

    states = session.make_empty_states(2)
    for t in range(LENGTH):
        step, states = session.run(ids[:, t : t + 1].tolist(), states)
        assert np.abs(step[:, 0] - wanted[:, t]).max() < EXACT

    # the first row begins with padding, and the calls are of different lengths
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    with torch.no_grad():
        alone = student(ids[:1, PADDING:], use_cache=False).logits.numpy()
    states, parts = session.make_empty_states(2), []
    for tokens, valid in zip(ids.split(PIECES, 1), mask.split(PIECES, 1)):
        part, states = session.run(tokens.tolist(), states, valid.tolist())
        parts.append(part)
    padded = np.concatenate(parts, 1)
    assert np.abs(padded[:1, PADDING:] - alone).max() < EXACT
    assert np.abs(padded[1:] - wanted[1:]).max() < EXACT


@pytest.mark.slow
def test_padding_between_tokens_counts_for_nothing(tmp_path):
    runtime()
    student = make_student("llama", "hybrid", {"window": 4, "sinks": 2, "conv": 3})
    write_export(EXPORTER, student, None, tmp_path / "out")
    session = onnx_export.GraphSession(tmp_path / "out")
    ids = make_ids(1)
    mask = torch.ones_like(ids)
    mask[0, [0, 7, 8, 21, 39]] = 0
    with torch.no_grad():
        wanted = student(ids[mask.bool()][None], use_cache=False).logits[0].numpy()
    states, parts = session.make_empty_states(1), []
    for tokens, valid in zip(ids.split(PIECES, 1), mask.split(PIECES, 1)):
        part, states = session.run(tokens.tolist(), states, valid.tolist())
        parts.append(part)
    assert np.abs(np.concatenate(parts, 1)[0][mask[0].numpy() > 0] - wanted).max() < EXACT


@pytest.mark.slow
def test_a_student_in_half_precision_is_written_in_float32_and_verified(tmp_path):
    runtime()
    student = make_student("llama", "gated_deltanet", {"conv": 2}).to(torch.bfloat16)
    write_export(EXPORTER, student, make_tokenizer(), tmp_path / "out")
    result = EXPORTER.verify(student, None, tmp_path / "out")
    assert result.passed
    assert result.engine == "onnxruntime"
    assert result.tokens == 64
    assert result.same_token == 1.0
    assert all(parameter.dtype == torch.bfloat16 for parameter in student.parameters())
    with torch.no_grad():
        student.model.layers[1].self_attn.mixer.strength.bias.add_(1)
    assert not EXPORTER.verify(student, None, tmp_path / "out").passed


def test_a_verification_is_long_enough_for_tokens_to_leave_the_window():
    assert onnx_export._count_tokens(make_student("llama", "gated_deltanet")) == 64
    assert onnx_export._count_tokens(make_student("llama", "hybrid", {"window": 100, "sinks": 4})) == 136
    assert onnx_export._count_tokens(make_student("llama", "sliding_window", {"window": 5000})) == 512


# ------------------------------------------------------------------ what the file holds


@pytest.mark.slow
def test_the_files_of_an_export(tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime()
    # small matrices are folded with what reads them, so the vocabulary is not too small
    teacher, words = make_tiny_model("llama", vocab_size=400), make_tokenizer()
    student = limbeck.convert(teacher, "gated_deltanet", options={"conv": 4}).eval()
    write_export(EXPORTER, student, words, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 27)]
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert kinds["LinearAttention"] == 2
    assert kinds["CausalConvWithState"] == 6
    rules = {
        a.s for n in graph.graph.node if n.op_type == "LinearAttention" for a in n.attribute if a.name == "update_rule"
    }
    assert rules == {b"gated_delta"}

    def shape(value):
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    inputs, outputs = ({value.name: shape(value) for value in part} for part in (graph.graph.input, graph.graph.output))
    assert inputs["input_ids"] == inputs["attention_mask"] == ["batch", "time"]
    assert inputs["past.0.memory"] == outputs["present.0.memory"] == ["batch", 6, 8, 8]
    assert inputs["past.1.conv_k"] == ["batch", 3, 2, 8]
    assert outputs["logits"] == ["batch", "time", 400]
    assert {name.replace("past.", "present.") for name in inputs if name.startswith("past.")} == set(outputs) - {
        "logits"
    }
    # the head shares the embeddings' tensor; what is folded with its reader is a constant, no stored tensor
    stored = sum(int(np.prod(tensor.dims)) for tensor in graph.graph.initializer)
    parameters = sum(p.numel() for p in student.parameters())
    assert abs(stored - parameters) < 400 * 24
    assert EXPORTER.plan(student, words, "f32").files == {"model.onnx": 4 * parameters}


@pytest.mark.slow
def test_weights_that_a_file_cannot_hold_go_beside_it(tmp_path, monkeypatch):
    runtime()
    monkeypatch.setattr("limbeck.models.export.onnx_graph.MAX_FILE_BYTES", 10_000)
    student = make_student("llama", "retnet")
    write_export(EXPORTER, student, None, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 4 * sum(
        p.numel() for p in student.parameters()
    ) * 0.9
    assert EXPORTER.verify(student, None, tmp_path / "out").passed


@pytest.mark.slow
def test_the_example_generates_what_the_student_does(tmp_path):
    onnxruntime = runtime()
    student = make_student("llama", "hybrid", {"window": 8}, softmax_layers="1")
    write_export(EXPORTER, student, make_tokenizer(), tmp_path / "out")
    example = load_script(ROOT / "examples" / "onnx" / "generate.py")
    ids = make_ids(1, 12)
    found = list(example.generate(onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx"), ids[0].tolist(), 20))
    wanted = student.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None)[0, 12:]
    assert found == wanted.tolist()


# ------------------------------------------------------------------ operators, in float64


@pytest.mark.parametrize(("window", "sinks"), [(8, 3), (1, 0), (1, 2), (5, 0), (30, 4)])
def test_the_window_is_that_of_the_mixer(window, sinks):
    mixer = build("sliding_window", HeadShape(32, 4, 2, 8, 8, scale=0.3), {"window": window, "sinks": sinks})
    compare_pieces(mixer, attend_window, ["k", "v", "count"])


def test_softmax_is_that_of_the_mixer():
    compare_pieces(build("softmax", HeadShape(32, 4, 2, 8, 8, scale=0.3)), attend_softmax, ["k", "v"])


def compare_pieces(mixer, attend, names):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 24, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[0, [0, 1, 2, 10, 11, 23]] = False
    state, wanted_state = {}, {}
    for piece in torch.arange(24).split([7, 1, 1, 15]):
        given = (q[:, piece], k[:, piece], v[:, piece])
        tokens = Tokens(valid[:, piece])
        found, state = attend(mixer, *given, None, tokens, state)
        wanted, wanted_state = mixer.attend(*given, None, tokens, wanted_state)
        seen = tokens.valid[..., None, None]
        torch.testing.assert_close(found * seen, wanted * seen, rtol=1e-12, atol=1e-12)
        for name in names:
            torch.testing.assert_close(state[name], wanted_state[name], rtol=0, atol=0)


@pytest.mark.parametrize("mixer", sorted(set(list_mixers()) - set(onnx_export.UNFIT)))
def test_the_step_of_every_mixer_is_the_student(mixer):
    """`check` runs the step in two calls on padded rows, beside the student on each row."""
    assert EXPORTER.check(make_student("llama", mixer), None) == []


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("mixer", "options", "said"),
    [
        ("rwkv7", {}, "erases along another vector"),
        ("gsa", {}, "decays by value channel"),
        ("lolcats", {}, "one normalizer for window and state"),
        ("mlstm", {}, "running maximum"),
        ("hybrid", {"linear": "rwkv7"}, "the mixer is rwkv7"),
    ],
)
def test_mixers_without_an_operator_are_refused_with_the_reason(tmp_path, mixer, options, said):
    student = make_student("llama", mixer, options)
    (reason,) = EXPORTER.check(student, None)
    assert said in str(reason)
    assert "(layers 0-1)" in str(reason)
    assert "student.mixer=gated_deltanet" in str(reason)
    with pytest.raises(LimbeckError, match=said):
        write_export(EXPORTER, student, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_reason_is_given():
    teacher = make_tiny_model("llama", num_hidden_layers=3)
    student = limbeck.convert(
        teacher, "gated_deltanet", rules=[{"layers": "0", "mixer": "rwkv7"}, {"layers": "2", "mixer": "gsa"}]
    )
    assert [str(reason).split("(")[1][:8] for reason in EXPORTER.check(student, None)] == ["layers 0", "layers 2"]


def test_families_with_states_of_their_own_are_refused():
    student = limbeck.convert(make_survey_model("qwen3_next"), "gated_deltanet")
    (reason,) = EXPORTER.check(student, None)
    assert "does not run as a step" in str(reason)


def test_a_step_that_is_not_the_student_is_refused(monkeypatch):
    student = make_student("llama", "gated_deltanet")
    monkeypatch.setattr(StudentStep, "_run", shifted(StudentStep._run))
    (reason,) = EXPORTER.check(student, None)
    assert "keeps track of positions or masks" in str(reason)


def shifted(run):
    """A family that loses track of its tokens between two calls."""

    def wrapper(self, input_ids, *args):
        return run(self, input_ids.flip(1), *args)

    return wrapper


def test_the_settings_that_fit():
    config = make_tiny_model("llama").config
    assert EXPORTER.fit(config, None).mixer == "gated_deltanet"
    assert EXPORTER.fit(config, "hybrid") == exports.Fit("hybrid", {})
    with pytest.raises(LimbeckError, match="no student with rwkv7 fits ONNX"):
        EXPORTER.fit(config, "rwkv7")


@pytest.mark.parametrize(("package", "call"), [("onnxscript", "write"), ("onnxruntime", "verify")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, call):
    real = importlib.import_module

    def without(name, *args):
        if name == package:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(onnx_export.importlib, "import_module", without)
    student = make_student("llama", "retnet")
    calls = {
        "write": lambda: write_export(EXPORTER, student, None, tmp_path / "out"),
        "verify": lambda: EXPORTER.verify(student, None, tmp_path),
    }
    with pytest.raises(LimbeckError, match=f"needs {package}") as caught:
        calls[call]()
    assert isinstance(caught.value, exports.EngineMissingError) == (call == "verify")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_graph_is_named(tmp_path):
    runtime()
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(LimbeckError, match="does not open"):
        onnx_export.GraphSession(tmp_path)


@pytest.mark.slow
def test_a_graph_says_what_it_came_from(tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime()
    write_export(EXPORTER, make_student("qwen2", "gla", softmax_layers="1"), None, tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    notes = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(notes["limbeck.mixers"]) == {"0": "gla"}
    assert notes["limbeck.family"] == "qwen2"
    assert graph.producer_name == "limbeck"
