"""The stages: what each one's loss is, and what it must not depend on."""

import contextlib
import functools
import math

import pytest
import torch
from torch import Tensor

import limbeck
from limbeck.core.errors import LimbeckError
from limbeck.data.packing import Batch
from limbeck.models import find_attention_sites
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.hooks import DistillationPair, hook_modules
from limbeck.testing import FAMILIES, make_tiny_model
from limbeck.testing.tiny_models import VOCAB_SIZE
from limbeck.training.alignment import HiddenStage, MatrixStage
from limbeck.training.calibration import NormalEquations
from limbeck.training.chunked_losses import TeacherLogitsFromCache, TeacherLogitsFromHidden, logit_losses
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights, hidden_distance, matrix_distance

NOTHING = contextlib.nullcontext
# what the control arm can mimic
PLAIN = {"gemma2": {"attn_logit_softcapping": None, "sliding_window": 64}, "mistral": {"sliding_window": 64}}
every_family = pytest.mark.parametrize("family", FAMILIES)


def batch_of(*documents: list[int], rows: int = 1) -> Batch:
    """Documents of the given lengths packed into each row."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, VOCAB_SIZE, (rows, n), generator=generator) for n in documents]
    positions = torch.cat([torch.arange(n) for n in documents])[None].expand(rows, -1)
    targets = torch.cat([torch.cat([i[:, 1:], torch.full((rows, 1), -100)], 1) for i in ids], 1)
    return Batch(torch.cat(ids, 1), positions, targets)


def repeated(batch: Batch) -> Batch:
    """Each row followed by itself, as further documents."""
    return Batch(*(torch.cat([x, x], 1) for x in (batch.input_ids, batch.position_ids, batch.targets)))


def pair(family: str, mixer: str, **kwargs):
    teacher = make_tiny_model(family, **PLAIN.get(family, {})).double().requires_grad_(False)
    student = limbeck.convert(teacher, mixer, **kwargs).requires_grad_(False)
    return teacher, student, find_attention_sites(teacher)


def stages_of(teacher, student, sites) -> dict:
    both = DistillationPair(teacher, student, sites, NOTHING)
    return {
        "matrix": MatrixStage(both),
        "hidden l2": HiddenStage(both, loss="l2"),
        "hidden relative": HiddenStage(both),
        "hidden block": HiddenStage(both, target="block", loss="l2"),
        "logits": LogitsStage(both, ObjectiveWeights(ce=0.3, kl=0.7, temperature=1.5)),
    }


def losses_of(stage, batch: Batch) -> dict[str, float]:
    return {name: float(value) for name, value in stage.evaluate(batch).items()}


@every_family
def test_an_identical_student_has_zero_loss_in_every_stage_and_layer(family):
    teacher, student, sites = pair(family, "softmax")
    batch = batch_of(9, 14, rows=2)
    for name, stage in stages_of(teacher, student, sites).items():
        losses = losses_of(stage, batch)
        if name == "logits":
            assert losses["kl"] == pytest.approx(0, abs=1e-6)
            assert losses["reverse_kl"] == pytest.approx(0, abs=1e-6)
            assert losses["ce"] == pytest.approx(losses["teacher_ce"], abs=1e-6)
            assert losses["agree"] == 1
        else:
            assert len(losses) == len(sites), name
            assert max(losses.values()) < 1e-5, (name, losses)


@every_family
def test_no_loss_depends_on_the_length(family):
    """Doubled with the same documents, every loss stays what it was; and none of them is zero."""
    teacher, student, sites = pair(family, "gla")
    batch = batch_of(9, 14, rows=2)
    for name, stage in stages_of(teacher, student, sites).items():
        once, twice = losses_of(stage, batch), losses_of(stage, repeated(batch))
        assert min(once.values()) > 1e-4 or name == "logits"
        for part in once:
            assert twice[part] == pytest.approx(once[part], rel=1e-5), (name, part)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_gradients_do_not_depend_on_how_a_step_is_split(family):
    teacher, student, sites = pair(family, "gated_deltanet")
    whole = batch_of(9, 14, rows=4)
    parts = [Batch(*(x[i : i + 1] for x in (whole.input_ids, whole.position_ids, whole.targets))) for i in range(4)]
    parts[0].targets[0, :7] = -100  # rows of unlike weight
    for name, stage in stages_of(teacher, student, sites).items():
        parameters = stage.parameters()
        for p in parameters.values():
            p.requires_grad_(True)
        gradients, totals = [], []
        for split in ([whole], parts):
            counts: dict[str, float] = {}
            for piece in split:
                for key, value in stage.count(piece).items():
                    counts[key] = counts.get(key, 0) + value
            results = [stage.backward(piece, counts) for piece in split]
            totals.append({key: sum(float(r[key]) for r in results) for key in results[0]})
            gradients.append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})
            student.zero_grad()
        assert gradients[0].keys() == gradients[1].keys()
        assert len(gradients[0]) > 0
        for key in gradients[0]:
            assert torch.allclose(gradients[0][key], gradients[1][key], atol=1e-8), (name, key)
        assert totals[0] == pytest.approx(totals[1], rel=1e-6)
        student.requires_grad_(False)


def test_the_matrix_stage_compares_matrices():
    teacher, student, sites = pair("llama", "retnet")
    shapes = []
    stage = MatrixStage(DistillationPair(teacher, student, sites, NOTHING))
    original = stage.loss

    def loss(module, args, kwargs, output, counts):
        shapes.append(output[1].shape)
        assert torch.allclose(output[1].sum(-1), torch.ones(()).double(), atol=1e-5), "rows of the teacher's matrix"
        return original(module, args, kwargs, output, counts)

    stage.loss = loss
    stage.evaluate(batch_of(12, rows=2))
    assert shapes == [(2, 6, 12, 12)] * 2
    assert teacher.config._attn_implementation != "eager", "the teacher was not put back"


def test_the_last_blocks_target_is_before_the_final_norm():
    teacher, _, sites = pair("llama", "softmax")
    seen = {}
    with hook_modules(teacher, {sites[-1].block: lambda a, k, out: seen.update(out=out)}), torch.no_grad():
        after = run_backbone(teacher, batch_of(8))
    out = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    assert torch.allclose(teacher.model.norm(out), after)
    assert not torch.allclose(out, after)


def test_padding_changes_no_distance():
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 6, 6).tril(), torch.rand(2, 3, 6, 6).tril()
    padded = [torch.nn.functional.pad(x, (2, 0, 2, 0), value=7.0) for x in (a, b)]
    padded[0][:, :, :2] = -3.0
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[:, :2] = False
    assert matrix_distance(*padded, valid) == pytest.approx(float(matrix_distance(a, b)), rel=1e-6)
    h, t = torch.rand(2, 6, 5), torch.rand(2, 6, 5)
    wide = [torch.nn.functional.pad(x, (0, 0, 2, 0), value=9.0) for x in (h, -t)]
    for loss in ("l2", "relative"):
        assert hidden_distance(*wide, valid, loss) == pytest.approx(float(hidden_distance(h, -t, loss=loss)), rel=1e-6)


def plain(s, t, targets, weights):
    """The weighted objectives as their papers write them, for torch to differentiate."""
    tau, total = weights.temperature, 0.0
    log_p, log_q = (s / tau).log_softmax(-1), (t / tau).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()

    def kl(a, log_a, log_b):
        return tau**2 * (a * (log_a - log_b)).sum()

    total += weights.ce * torch.nn.functional.cross_entropy(s, targets, reduction="sum")
    total += weights.kl * kl(q, log_q, log_p) + weights.reverse_kl * kl(p, log_p, log_q)
    mixture = (weights.beta * q + (1 - weights.beta) * p).log()
    total += weights.jsd * (weights.beta * kl(q, log_q, mixture) + (1 - weights.beta) * kl(p, log_p, mixture))
    if not weights.top_kl:
        return total
    index = t.topk(weights.top_k).indices
    both = [torch.cat([x.gather(1, index), 1 - x.gather(1, index).sum(1, keepdim=True)], 1) for x in (q, p)]
    return total + weights.top_kl * kl(both[0], both[0].log(), both[1].log())


EACH = [
    ObjectiveWeights(ce=1, kl=0),
    ObjectiveWeights(),
    ObjectiveWeights(kl=0, reverse_kl=1),
    ObjectiveWeights(kl=0, jsd=1),
    ObjectiveWeights(kl=0, jsd=1, beta=0.1),
    ObjectiveWeights(kl=0, top_kl=1, top_k=5),
    ObjectiveWeights(ce=0.5, kl=2, temperature=1.7),
    ObjectiveWeights(ce=0.1, kl=0, reverse_kl=1, temperature=0.6),
    ObjectiveWeights(ce=0.9, kl=0.1),
    ObjectiveWeights(ce=0.3, kl=0.2, reverse_kl=0.7, jsd=1.3, top_kl=0.4, top_k=7, temperature=1.3),
]


@pytest.mark.parametrize("bias", [True, False])  # without one the head is a product, whose gradient is added in place
@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("weights", EACH, ids=lambda w: ",".join(w.active()) + f" at {w.temperature}")
def test_the_fused_loss_is_the_plain_one_with_its_gradient(weights, chunk, bias):
    torch.manual_seed(0)
    head_s, head_t = torch.nn.Linear(8, 31, bias=bias).double(), torch.nn.Linear(6, 31).double()
    h = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 9, 6, dtype=torch.float64)
    targets = torch.randint(0, 31, (2, 9))
    targets[0, 3:5] = -100
    valid = targets != -100
    loss = plain(head_s(h)[valid], head_t(teacher)[valid].detach(), targets[valid], weights)
    want_h, want_w = torch.autograd.grad(loss / 7, [h, head_s.weight])
    signal = TeacherLogitsFromHidden(head_t, teacher)
    sums, got = logit_losses(head_s, h, signal, targets, weights, scale=1 / 7, chunk_size=chunk)
    assert not got.requires_grad, "holds on to a chunk's slopes"
    # losses are taken in float32, whatever the models' precision
    assert torch.allclose(got, want_h, atol=1e-6)
    assert torch.allclose(head_s.weight.grad, want_w, atol=1e-6)
    assert float(sums["count"]) == 16
    assert float(sums["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    ce = torch.nn.functional.cross_entropy(head_s(h)[valid], targets[valid], reduction="sum")
    assert float(sums["ce"]) == pytest.approx(float(ce.detach()), rel=1e-5)
    again, nothing = logit_losses(head_s, h, signal, targets, weights, compute_grad=False)
    assert nothing is None
    assert float(again["loss"]) == pytest.approx(float(sums["loss"]), rel=1e-6)


@pytest.mark.parametrize("top", [1, 6, 31])
def test_a_cached_signal_gives_what_the_teacher_gives(top):
    torch.manual_seed(0)
    head_s, head_t = torch.nn.Linear(8, 31), torch.nn.Linear(6, 31)
    h, teacher, targets = torch.randn(1, 9, 8), torch.randn(1, 9, 6), torch.randint(0, 31, (1, 9))
    weights = ObjectiveWeights(ce=0.2, kl=0, top_kl=1, top_k=top)
    cached = head_t(teacher).log_softmax(-1).detach().topk(top)
    found = [
        logit_losses(head_s, h, signal, targets, weights)
        for signal in (TeacherLogitsFromHidden(head_t, teacher), TeacherLogitsFromCache(cached.indices, cached.values))
    ]
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)
    for name in ("loss", "ce", "agree"):
        assert float(found[0][0][name]) == pytest.approx(float(found[1][0][name]), rel=1e-5)
    if top == 31:  # nothing is left for the tail
        whole = logit_losses(head_s, h, TeacherLogitsFromHidden(head_t, teacher), targets, ObjectiveWeights(ce=0.2))
        assert torch.allclose(found[1][1], whole[1], atol=1e-5)
    with pytest.raises(LimbeckError, match="most likely tokens"):
        logit_losses(head_s, h, TeacherLogitsFromCache(cached.indices, cached.values), targets, ObjectiveWeights())


def test_a_vocabulary_padded_on_one_side_is_no_obstacle():
    torch.manual_seed(0)
    head_s, head_t = torch.nn.Linear(8, 40), torch.nn.Linear(8, 31)
    h, targets = torch.randn(1, 4, 8), torch.tensor([[1, 2, 3, -100]])
    sums, gradient = logit_losses(head_s, h, TeacherLogitsFromHidden(head_t, h), targets, ObjectiveWeights(ce=1))
    assert gradient.isfinite().all()
    assert head_s.weight.grad[31:].abs().sum() == 0
    assert float(sums["ce"]) > 0


@pytest.mark.parametrize("loss", ["l2", "relative", "mse", "cosine"])
def test_distances_of_hidden_states(loss):
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    each = {
        "l2": lambda x, y: math.dist(x, y),
        "relative": lambda x, y: math.dist(x, y) ** 2 / sum(v * v for v in y),
        "mse": lambda x, y: math.dist(x, y) ** 2 / 7,
        "cosine": lambda x, y: 1 - sum(v * w for v, w in zip(x, y)) / math.hypot(*x) / math.hypot(*y),
    }[loss]
    want = sum(each(x.tolist(), y.tolist()) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1)))
    assert float(hidden_distance(a, b, loss=loss)) == pytest.approx(want)
    assert float(hidden_distance(a, a, loss=loss)) == pytest.approx(0, abs=1e-9)
    with torch.enable_grad():
        same = a.clone().requires_grad_(True)
        hidden_distance(same, a, loss=loss).backward()
    assert same.grad.isfinite().all()


def test_what_a_loss_makes_of_the_teacher_alone_is_made_once(monkeypatch):
    """Several students learn from one tensor; one that has changed meanwhile is another."""
    student, teacher = torch.randn(2, 5, 8, dtype=torch.float16), torch.randn(2, 5, 8, dtype=torch.float16)
    first = hidden_distance(student, teacher)
    seen = []
    monkeypatch.setattr(Tensor, "clamp_min", lambda x, *a, original=Tensor.clamp_min: seen.append(x) or original(x, *a))
    assert hidden_distance(student, teacher) == first
    assert not seen
    teacher.mul_(2)
    fresh = teacher.clone()
    assert hidden_distance(student, teacher) == hidden_distance(student, fresh) != first
    assert len(seen) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_calibration_is_the_least_squares_solution(family):
    """Against torch's own solver on the features as they come, biases included."""
    teacher, student, sites = pair(family, "gla")
    fits = NormalEquations(DistillationPair(teacher, student, sites, NOTHING))
    batches = [batch_of(40, 24, rows=3), batch_of(60, rows=2)]
    features, targets = [], []
    site = sites[1]
    projection = student.get_submodule(f"{site.module}.{site.output}")
    projection.register_forward_pre_hook(lambda m, x: features.append(x[0].flatten(0, -2)))
    with hook_modules(teacher, {site.module: lambda a, k, out: targets.append(out[0].flatten(0, -2))}):
        for batch in batches:
            fits.add(batch)
    f, y = torch.cat(features), torch.cat(targets)
    before = float((projection(f) - y).square().sum() / y.square().sum())
    unexplained = fits.solve(1e-9)
    after = float((projection(f) - y).square().sum() / y.square().sum())
    if projection.bias is not None:
        f = torch.cat([f, torch.ones(len(f), 1)], 1)
    best = torch.linalg.lstsq(f, y).solution
    assert after == pytest.approx(float((f @ best - y).square().sum() / y.square().sum()), rel=1e-3)
    assert after < before
    assert 0 < unexplained < 1
    fits.solve(1e9)
    assert torch.allclose(projection.weight, teacher.get_submodule(f"{site.module}.{site.output}").weight, atol=1e-6)


@torch.no_grad()
def test_calibrating_the_control_arm_leaves_it_the_teacher():
    teacher, student, sites = pair("llama", "softmax")
    fits = NormalEquations(DistillationPair(teacher, student, sites, NOTHING))
    fits.add(batch_of(50, rows=4))
    assert fits.solve(1e-2) == pytest.approx(0, abs=1e-6)
    batch = batch_of(20)
    assert torch.allclose(run_backbone(student, batch), run_backbone(teacher, batch), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_three_trains_what_it_says(family):
    teacher, student, sites = pair(family, "gla")
    everything = dict(student.named_parameters())
    by = {
        train: LogitsStage(DistillationPair(teacher, student, sites, NOTHING), ObjectiveWeights(), train).parameters()
        for train in ("attention", "body", "all")
    }
    assert by["all"].keys() == everything.keys()
    assert set(by["attention"]) < set(by["body"]) < set(by["all"])
    assert all(".mixer." in n or "attn" in n for n in by["attention"])
    left = {id(p) for n, p in everything.items() if n not in by["body"]}
    ends = {id(p) for m in (student.get_input_embeddings(), student.get_output_embeddings()) for p in m.parameters()}
    assert left == ends


def test_small_updates_survive_and_heads_agree():
    """fp32 masters: a thousand updates of 1e-6 move a weight by 1e-3, which bf16 weights would lose."""
    teacher, student, _ = pair("llama", "gla")
    student = student.float()
    weight = student.model.layers[0].self_attn.q_proj.weight
    start = weight.clone()
    for _ in range(1000):
        weight.add_(1e-6)
    assert float((weight - start).mean()) == pytest.approx(1e-3, rel=0.05)
    assert math.isclose(float(LMHead(teacher)(torch.zeros(1, 48, dtype=torch.float64)).abs().sum()), 0, abs_tol=1e-12)


def test_autocast_changes_losses_and_gradients_a_little():
    """The precision of the CUDA path, as far as a CPU can run it: bf16 products over fp32 weights."""
    autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    batch, results = batch_of(16, 30, rows=2), []
    for context in (NOTHING, autocast):
        teacher, student, sites = pair("llama", "gated_deltanet")
        teacher, student = teacher.float(), student.float()
        both = DistillationPair(teacher, student, sites, context)
        for stage in (MatrixStage(both), HiddenStage(both), LogitsStage(both, ObjectiveWeights(ce=0.5, kl=0.5))):
            for p in stage.parameters().values():
                p.requires_grad_(True)
            losses = stage.backward(batch, stage.count(batch))
            norm = torch.stack([p.grad.norm() for p in stage.parameters().values() if p.grad is not None]).norm()
            assert all(p.grad.dtype == torch.float32 for p in stage.parameters().values() if p.grad is not None)
            results.append([sum(float(x) for x in losses.values()), float(norm)])
            student.zero_grad()
            student.requires_grad_(False)
    exact, mixed = results[:3], results[3:]
    assert exact != mixed
    for a, b in zip(exact, mixed):
        assert b == pytest.approx(a, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_checkpointed_activations_give_the_same_gradients(family):
    teacher, student, sites = pair(family, "gated_deltanet", layers=[0])
    batch, gradients, runs = batch_of(9, 14, rows=2), [], []
    block = student.get_submodule(sites[1].block)
    run_backbone(student, batch)  # tries on the first call how the family packs documents
    count = next(m for m in block.modules() if isinstance(m, torch.nn.LayerNorm) or "Norm" in type(m).__name__)
    handle = count.register_forward_pre_hook(lambda *_: runs.append(1))
    for again in (False, True):
        stage = LogitsStage(
            DistillationPair(teacher, student, sites[:1], NOTHING),
            ObjectiveWeights(ce=0.5, kl=0.5),
            checkpoint_activations=again,
        )
        for p in stage.parameters().values():
            p.requires_grad_(True)
        stage.backward(batch, stage.count(batch))
        gradients.append({n: p.grad.clone() for n, p in stage.parameters().items() if p.grad is not None})
        student.zero_grad()
    handle.remove()
    assert len(runs) == 3, "the block was not run again"
    assert "forward" not in block.__dict__
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
