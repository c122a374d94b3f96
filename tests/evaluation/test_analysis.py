"""Mixing matrices and hidden states beside the teacher's: formulas by hand, and what must come out as the same."""

import math

import pytest
import torch
from test_agreement import Documents

import limbeck
from limbeck.core.errors import LimbeckError
from limbeck.evaluation import measure as measures
from limbeck.evaluation import mixing_statistics as stats
from limbeck.evaluation.agreement import evaluate_agreement
from limbeck.evaluation.hidden_states import compare_hidden_states, linear_cka, mean_cosine
from limbeck.evaluation.mixing import collect_mixing_statistics, downsample_matrix, find_longest_document
from limbeck.evaluation.mixing_statistics import compute_half_life, record_decays
from limbeck.evaluation.subject import SubjectLoader, build_untrained_student
from limbeck.mixers.options import log_decays_from_half_lives
from limbeck.models import find_attention_sites
from limbeck.report import comparison
from limbeck.testing import make_tiny_model

WINDOW = 4
SMALL = {"tokens": 128, "length": 64}


@pytest.fixture(scope="module")
def teacher():
    return make_tiny_model("llama").requires_grad_(False)


def student_of(teacher, mixer: str, **kwargs):
    return limbeck.convert(teacher, mixer, **kwargs).eval().requires_grad_(False)


def permuted(teacher, compensated: bool):
    """The control arm with its heads in another order; `compensated` puts the output projection's columns in it too."""
    student = student_of(teacher, "softmax")
    for site in find_attention_sites(teacher):
        shape, module = site.shape, student.get_submodule(site.module)
        group = shape.heads // shape.kv_heads
        keys = torch.arange(shape.kv_heads).flip(0)
        heads = (keys[:, None] * group + torch.arange(group).flip(0)).flatten()
        for name, order in (("q_proj", heads), ("k_proj", keys), ("v_proj", keys)):
            weight = getattr(module, name).weight
            weight.copy_(weight.view(len(order), -1, weight.shape[1])[order].reshape(weight.shape))
        if compensated:
            weight = module.o_proj.weight
            weight.copy_(weight.view(len(weight), shape.heads, -1)[:, heads].reshape(weight.shape))
    return student


def mean(layers, whose: str, name: str) -> float:
    return float(torch.stack([layer.means(whose)[name] for layer in layers]).mean())


# ------------------------------------------------------------------ formulas


def test_where_an_even_head_looks():
    length = 12
    p = torch.ones(1, length, length).tril()
    p = stats.normalize_rows(7 * p)  # a factor changes nothing
    index = torch.arange(length).double()
    found = stats.summarize_rows(p, torch.arange(length), WINDOW)
    torch.testing.assert_close(found["distance"][0].double(), index / 2)
    torch.testing.assert_close(found["entropy"][0].double(), (index + 1).log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["first_token"][0].double(), 1 / (index + 1))
    torch.testing.assert_close(found["diagonal"][0].double(), 1 / (index + 1))
    torch.testing.assert_close(found["window"][0].double(), WINDOW / (index + 1).clamp_min(WINDOW))


def test_the_first_token_is_the_documents():
    position = torch.tensor([0, 1, 0, 1, 2])
    matrix = torch.zeros(1, 5, 5)
    matrix[0, 2:, 2] = 1
    assert stats.summarize_rows(stats.normalize_rows(matrix), position, WINDOW)["first_token"][0, 2:].tolist() == [
        1,
        1,
        1,
    ]


def test_overlap_and_diversity():
    here, there = torch.eye(6), torch.zeros(6, 6)
    there[:, 0] = 1
    p = stats.normalize_rows(torch.stack([here, here, there]))
    assert stats.row_overlap(p[:1], p[1:2]).tolist() == [[1] * 6]
    assert stats.row_overlap(p[:1], p[2:])[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert stats.head_diversity(p)[:, 1:].mean(1).tolist() == [0.5, 0.5, 1.0]
    assert stats.head_diversity(p[:1]).abs().sum() == 0
    half = stats.normalize_rows((here + there)[None])
    assert stats.row_overlap(half, p[:1])[0, 3] == 0.5


def test_negative_entries():
    matrix = torch.tensor([[[1.0, 0, 0], [-1, 3, 0], [0, 0, 0]]])
    assert stats.negative_mass(matrix)[0].tolist() == [0, 0.25, 0]
    assert stats.normalize_rows(matrix)[0].sum(-1).tolist() == [1, 1, 0]


def test_effective_rank():
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(8, 1, generator=generator) * torch.rand(1, 8, generator=generator)
    found = stats.effective_rank(torch.stack([torch.eye(8) * torch.arange(1, 9), one]))
    assert found.tolist() == pytest.approx([8, 1], rel=1e-4)


def test_effective_rank_is_of_singular_values():
    matrix = torch.randn(3, 10, 10, generator=torch.Generator().manual_seed(2)).tril()
    share = torch.linalg.svdvals((matrix / matrix.abs().sum(-1, keepdim=True)).double())
    share = share / share.sum(-1, keepdim=True)
    torch.testing.assert_close(stats.effective_rank(matrix), (-(share * share.log()).sum(-1)).exp(), rtol=1e-6, atol=0)


def test_rank_correlation():
    x = torch.tensor([1.0, 5, 2, 9])
    assert stats.spearman_correlation(x, x.exp()) == pytest.approx(1)
    assert stats.spearman_correlation(x, -x) == pytest.approx(-1)
    assert stats.spearman_correlation(torch.tensor([1.0, 1, 2]), torch.tensor([1.0, 2, 3])) == pytest.approx(
        math.sqrt(0.75)
    )
    assert stats.spearman_correlation(torch.ones(3), x[:3]) is None


def test_linear_cka():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=generator), torch.randn(50, 9, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, 3 * x @ rotation + 2) == pytest.approx(1, abs=1e-5)
    assert abs(mean_cosine(x, x @ rotation)) < 0.9
    centre = torch.eye(50) - 1 / 50  # HSIC of the Gram matrices, equation 3 of the paper
    k, ell = (centre @ (z @ z.T) @ centre for z in (x, y))
    expected = float((k * ell).sum() / (k.square().sum() * ell.square().sum()).sqrt())
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-4)
    assert linear_cka(x, y) < 0.5


def test_pictures_of_matrices():
    assert find_longest_document(torch.tensor([4, 5, 0, 1, 2, 0, 1])) == slice(2, 5)
    assert find_longest_document(torch.tensor([0, 1, 2])) == slice(0, 3)
    small = downsample_matrix(stats.normalize_rows(torch.ones(1, 10, 10).tril())[0], 4)
    assert small.shape == (4, 4)
    torch.testing.assert_close(small.sum(1), torch.ones(4))


# ------------------------------------------------------------------ identities


def test_a_teacher_is_like_itself(teacher):
    data = Documents(5, 27)
    layers = collect_mixing_statistics(teacher, teacher, None, data, 2, WINDOW)
    assert mean(layers, "student", "overlap") == 1
    assert layers[0].rows == 2 * (1 + 23)
    for found in compare_hidden_states(teacher, teacher, data.batch(0, 3)):
        assert list(found.values()) == pytest.approx([1] * 6, abs=1e-5)


def test_the_control_arm_is_its_teacher(teacher):
    data = Documents(5, 27)
    student = student_of(teacher, "softmax")
    layers = collect_mixing_statistics(teacher, student, student, data, 2, WINDOW)
    for layer in layers:
        mine, theirs = layer.means("student"), layer.means("teacher")
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
    for found in compare_hidden_states(teacher, student, data.batch(0, 3)):
        assert list(found.values()) == pytest.approx([1] * 6, abs=1e-4)


def test_permuted_heads_show(teacher):
    data = Documents(5, 27)
    same, other = permuted(teacher, compensated=True), permuted(teacher, compensated=False)
    for student in (same, other):
        layers = collect_mixing_statistics(teacher, student, None, data, 2, WINDOW)
        assert mean(layers, "student", "overlap") < 0.9
        for name in ("distance", "entropy", "diversity", "effective_rank"):  # as means over heads they stay
            assert mean(layers, "student", name) == pytest.approx(mean(layers, "teacher", name), rel=1e-3)
    assert evaluate_agreement(teacher, same, data, 96)["kl"] < 1e-5
    assert evaluate_agreement(teacher, other, data, 96)["kl"] > 0.01
    for kept, lost in zip(
        compare_hidden_states(teacher, same, data.batch(0, 3)), compare_hidden_states(teacher, other, data.batch(0, 3))
    ):
        assert kept["cka_attention"] == pytest.approx(1, abs=1e-4)
        assert lost["cka_attention"] < 0.98


def test_kept_layers_of_a_hybrid_are_the_teachers(teacher):
    student = student_of(teacher, "gla", softmax_layers="0")
    layers = collect_mixing_statistics(
        teacher, student, build_untrained_student(teacher, student), Documents(5, 27), 2, WINDOW
    )
    assert [layer.mixer for layer in layers] == ["softmax"] + ["gla"] * (len(layers) - 1)
    assert float(layers[0].means("student")["overlap"].mean()) == pytest.approx(1, abs=1e-5)
    assert float(layers[1].means("student")["overlap"].mean()) < 0.99
    assert not layers[0].decays
    assert len(layers[1].decays) == 2


def test_layers_are_fed_by_the_teacher(teacher):
    """What a lower layer does wrong does not reach the matrices of the layers above it, and does reach free states."""
    data = Documents(5, 27)
    student = student_of(teacher, "softmax")
    student.get_submodule(find_attention_sites(teacher)[0].module).o_proj.weight.mul_(-1)
    layers = collect_mixing_statistics(teacher, student, None, data, 1, WINDOW)
    assert mean(layers, "student", "overlap") == pytest.approx(1, abs=1e-4)
    found = compare_hidden_states(teacher, student, data.batch(0, 3))
    assert found[0]["cosine_attention"] == pytest.approx(-1, abs=1e-4)
    assert found[1]["cosine_block"] == pytest.approx(1, abs=1e-4)
    assert found[1]["cosine_free"] < 0.99


def test_a_fresh_student_is_the_students_start(teacher):
    student = student_of(teacher, "gla", softmax_layers="0", rules=[{"layers": "1", "mixer": "retnet"}])
    fresh = build_untrained_student(teacher, student)
    assert fresh.config.limbeck["layers"] == student.config.limbeck["layers"]
    assert evaluate_agreement(teacher, fresh, Documents(20), 40)["kl"] > 0


# ------------------------------------------------------------------ half-lives


def lives_of(student, mixer_input=None):
    site = find_attention_sites(student)[0] if mixer_input is None else mixer_input
    module = student.get_submodule(site.module)
    with record_decays(module) as found, torch.no_grad():
        student.get_decoder()(input_ids=Documents(20).ids[:1], use_cache=False)
    return compute_half_life(found, site.shape.heads)


@pytest.mark.parametrize("mixer", ["retnet", "mlstm", "gla", "gated_deltanet", "kda", "hgrn2"])
def test_half_lives_at_the_start(teacher, mixer):
    """Where the decays do not depend on the tokens yet, half-lives are those that the mixer documents."""
    student = student_of(teacher, mixer)
    site = find_attention_sites(teacher)[0]
    found = lives_of(student, site)
    module = student.get_submodule(site.module).mixer
    if mixer == "retnet":
        expected = -math.log(2) / torch.log1p(-(2.0 ** (-5 - torch.arange(site.shape.heads).float())))
    elif mixer == "hgrn2":
        assert bool((found > 0).all())
        return
    else:
        log_decay = log_decays_from_half_lives(site.shape.heads, module.options.shortest, module.options.longest)
        expected = -math.log(2) / log_decay
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_half_lives_follow_the_gates(teacher):
    """mLSTM's operands hold the steps of its stabiliser; what is left without them are the forget gates."""
    student = student_of(teacher, "mlstm")
    site = find_attention_sites(teacher)[0]
    mixer = student.get_submodule(site.module).mixer
    mixer.input_gate.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    mixer.forget_gate.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    seen = []
    handle = mixer.forget_gate.register_forward_hook(lambda module, args, output: seen.append(output))
    found = lives_of(student, site)
    handle.remove()
    cap = mixer.options.soft_cap
    log_f = torch.nn.functional.logsigmoid(cap * torch.tanh(seen[0] / cap))[0, 1:]
    torch.testing.assert_close(found, -math.log(2) / log_f.mean(0), rtol=1e-3, atol=1e-3)


def test_no_decay_no_half_life(teacher):
    for mixer in ("linear_attention", "deltanet", "sliding_window"):
        assert lives_of(student_of(teacher, mixer), find_attention_sites(teacher)[0]) is None


# ------------------------------------------------------------------ measures


@pytest.fixture(scope="module")
def student_folder(teacher, shared_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("students") / "mlstm"
    student_of(teacher, "mlstm", softmax_layers="0").save_pretrained(folder)
    shared_tokenizer.save_pretrained(folder)
    return folder


def test_the_measures(own_cache, student_folder, teacher_folder, corpus, tmp_path):
    subjects = SubjectLoader(str(teacher_folder), str(corpus), out=tmp_path / "out")
    found = []
    for name in (str(student_folder), str(teacher_folder)):
        subject = subjects.load(name)
        found += [
            measures.run_measure(measures.get_measure(measure), subject, SMALL) for measure in ("mixing", "hidden")
        ]
    student, teacher = found[0], found[2]
    assert student.values["overlap"] == pytest.approx(student.values["fresh_overlap"], abs=1e-5)  # nobody trained it
    assert 0 < student.values["overlap"] < 1
    assert teacher.values["overlap"] == 1
    assert teacher.values["negative"] == 0
    assert student.values["median_half_life"] > 1
    assert "half_life" not in student.details["layers"][0]
    assert len(student.details["layers"][1]["half_life"]) == len(student.details["layers"][1]["student"]["overlap"])
    assert found[3].values["cka_free"] == pytest.approx(1, abs=1e-5)
    assert 0 < found[1].values["cka_attention"] < 1
    comparison.write_comparison(found, tmp_path / "figures")
    for name in ("mixing", "hidden"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000


def test_a_window_as_long_as_the_documents(own_cache, student_folder, teacher_folder, corpus):
    subject = SubjectLoader(str(teacher_folder), str(corpus)).load(str(student_folder))
    with pytest.raises(LimbeckError, match="no document of more than 64 tokens"):
        measures.run_measure(measures.get_measure("mixing"), subject, {**SMALL, "window": 64})
