"""Which groups of heads keep softmax: gates and their derivative, both scores, the command and its file."""

import json

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import limbeck
from limbeck import LimbeckError
from limbeck.cli import main
from limbeck.data.packing import Batch
from limbeck.models import find_attention_sites
from limbeck.models.head_groups import resolve_softmax_heads
from limbeck.testing.contract import sample_ids
from limbeck.testing.tiny_models import make_tiny_model
from limbeck.training import head_selection
from limbeck.training.head_selection import GatedTeacher
from limbeck.training.layer_selection import make_repeated_batch

GROUPS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def gated(family: str = "llama", window: int = 4, **settings):
    teacher = make_tiny_model(family, **settings).double().requires_grad_(False)
    ids = sample_ids(2, 60)
    text = Batch(ids, torch.arange(60).expand(2, -1), ids)
    model = GatedTeacher(teacher, find_attention_sites(teacher), window, sinks=2)
    return teacher, model, head_selection.prepare_texts(text, teacher.device)


@torch.no_grad()
def exact_loss(model, texts: list[Batch]) -> float:
    """The mean loss of texts of one length, in float64; `logit_losses` takes logits in float32."""
    ids, targets = (torch.cat([getattr(text, name) for text in texts]) for name in ("input_ids", "targets"))
    logits = model(ids, use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def normalize(self, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the dtype of its input."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@torch.no_grad()
def test_the_ends_of_the_gates_are_students():
    teacher, model, _ = gated()
    ids = sample_ids(2, 40)
    model.set_gates({}, rest=1.0)
    assert torch.allclose(model.model(ids, use_cache=False).logits, teacher(ids).logits, atol=1e-10)
    options = {"window": 4, "sinks": 2}
    model.set_gates({})
    windowed = limbeck.convert(teacher, "sliding_window", options=options)
    assert torch.allclose(model.model(ids, use_cache=False).logits, windowed(ids).logits, atol=1e-10)
    model.set_gates({(1, 0): 1.0})
    split = limbeck.convert(teacher, "sliding_window", options=options, softmax_heads="1.0")
    assert torch.allclose(model.model(ids, use_cache=False).logits, split(ids).logits, atol=1e-10)
    assert not torch.allclose(split(ids).logits, windowed(ids).logits, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_worth_is_the_derivative_of_the_loss(family, monkeypatch):
    # llama's own norm computes in float32, whose rounding a difference quotient divides by its step
    monkeypatch.setattr(LlamaRMSNorm, "forward", normalize)
    _, model, texts = gated(family)
    for gates, rest in (({}, 0.0), ({model.groups[1]: 1.0}, 0.5)):
        model.set_gates(gates, rest)
        worth = model.measure_worth(texts)
        assert list(worth) == model.groups
        for group in model.groups[:4]:
            now = gates.get(group, rest)
            ends = []
            for step in (1e-3, -1e-3):
                model.set_gates({**gates, group: now + step}, rest)
                ends.append(exact_loss(model.model, texts))
            # the loss that is differentiated takes its logits in float32
            assert worth[group] == pytest.approx((ends[1] - ends[0]) / 2e-3, rel=1e-4, abs=1e-6)


def test_along_the_whole_path_the_worth_is_the_loss():
    """Integrated gradients sum to the difference between both ends."""
    _, model, texts = gated()
    path = [(i + 0.5) / 40 for i in range(40)]
    worth = head_selection.select_by_path(model, texts, 3, rounds=1, path=path)
    total = sum(worth.values())
    model.set_gates({})
    difference = model.measure_loss(texts)
    model.set_gates({}, rest=1.0)
    difference -= model.measure_loss(texts)
    (last,) = set(GROUPS) - set(worth)
    missing = 0.0
    for opening in path:
        model.set_gates({}, rest=opening)
        missing += model.measure_worth(texts)[last] / len(path)
    assert total + missing == pytest.approx(difference, abs=1e-3 * max(1.0, abs(difference)))
    assert missing <= min(worth.values())


def test_a_swap_costs_what_it_costs():
    teacher, model, texts = gated()
    prices = head_selection.price_by_swap(model, texts)
    assert list(prices.values()) == sorted(prices.values(), reverse=True)
    assert set(prices) == set(GROUPS)
    others = [f"{layer}.{group}" for layer, group in GROUPS if (layer, group) != (1, 1)]
    swapped = limbeck.convert(teacher, "sliding_window", options={"window": 4, "sinks": 2}, softmax_heads=others)
    expected = exact_loss(swapped, texts) - exact_loss(teacher, texts)
    assert prices[1, 1] == pytest.approx(expected, abs=1e-5)


def test_rounds_share_out_the_groups_and_see_those_before(monkeypatch):
    _, model, texts = gated()
    seen: list[dict] = []

    def measure(self, texts):
        gates = {g: float(self.layers[g[0]].gates[g[1]].detach()) for g in self.groups}
        seen.append(gates)
        # (0, 0) is worth much until (1, 1) is there
        return {(0, 0): 0.1 if gates[1, 1] == 1 else 3.0, (0, 1): 2.0, (1, 0): 1.0, (1, 1): 4.0}

    monkeypatch.setattr(GatedTeacher, "measure_worth", measure)
    assert head_selection.select_by_path(model, texts, 2, rounds=5, path=[0.5]) == {(1, 1): 4.0, (0, 1): 2.0}
    assert [gates[1, 1] for gates in seen] == [0.5, 1.0]
    assert list(head_selection.select_by_path(model, texts, 2, rounds=1, path=[0.5])) == [(1, 1), (0, 0)]


@pytest.mark.parametrize(("count", "by"), [(0, "path"), (4, "path"), (1, "kl")])
def test_impossible_selections(count, by):
    _, model, texts = gated()
    with pytest.raises(LimbeckError):
        head_selection.select_heads(model, texts, count, by)


def test_texts_are_repeated_rows():
    ids = sample_ids(2, 60)
    text = Batch(ids, torch.arange(60).expand(2, -1), ids)
    rows = head_selection.prepare_texts(text, torch.device("cpu"))
    assert torch.equal(torch.cat([row.input_ids for row in rows]), make_repeated_batch(text).input_ids)
    with pytest.raises(LimbeckError, match="too short"):
        head_selection.prepare_texts(Batch(ids[:, :20], ids[:, :20], ids[:, :20]), torch.device("cpu"))


# ------------------------------------------------------- the command


def call(words: list[str], monkeypatch) -> int:
    monkeypatch.setattr("sys.argv", ["limbeck", *words])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("by", ["path", "swap"])
def test_the_command_writes_what_convert_reads(by, teacher_folder, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--teacher", str(teacher_folder), "--data", str(corpus), "--seq-len", "48", "--judged", "48"]
    ours = ["--window", "4", "--num-softmax-heads", "1", "--by", by]
    assert call(["select", "--heads", *words, *ours], monkeypatch) == 0
    made = json.loads((tmp_path / "softmax_heads.json").read_text(encoding="utf-8"))
    assert made["by"] == by
    assert list(made["worth"]) == made["softmax_heads"]
    assert len(made["softmax_heads"]) == 1
    assert set(made["loss_on_repeat"]) == {"softmax", "window", "chosen"}
    assert resolve_softmax_heads("softmax_heads.json", [9] * 9)
    capsys.readouterr()
    given = ["--student", "sliding_window", "--softmax-heads", "softmax_heads.json"]
    assert call(["convert", str(teacher_folder), "made", *given], monkeypatch) == 0
    assert "head groups: " + made["softmax_heads"][0] in "".join(capsys.readouterr()).replace("\n", " ")
    plan = json.loads((tmp_path / "made" / "config.json").read_text(encoding="utf-8"))["limbeck"]
    assert sum(entry["mixer"] == "head_split" for entry in plan["layers"]) == 1


@pytest.mark.parametrize("wrong", [["--by", "kl"], ["--num-softmax-heads", "0"], ["--num-softmax-heads", "99"]])
def test_the_command_refuses(wrong, teacher_folder, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--teacher", str(teacher_folder), "--data", str(corpus), "--seq-len", "48"]
    assert call(["select", "--heads", *words, *wrong], monkeypatch) == 2
    assert not list(tmp_path.iterdir())
