"""benchmarks/starts.py: a start is what its source says, and the table has a row for each."""

import math

import pytest
import torch

from helpers.paths import ROOT
from helpers.scripts import load_script
from limbeck.data.packing import Batch
from limbeck.models import get_mixers
from limbeck.models.loading import load_teacher

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def starts():
    return load_script(ROOT / "benchmarks" / "starts.py")


def test_starts_are_what_their_sources_say(starts, teacher_folder):
    grouped, _ = load_teacher(str(teacher_folder), torch.device("cpu"))
    groups, heads = grouped.config.num_key_value_heads, grouped.config.num_attention_heads
    assert groups < heads
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.arange(24).expand(2, -1), ids)
    teacher = starts.write_out_groups(grouped)
    starts.check_same_function(grouped, teacher, batch)
    scrambled = starts.write_out_groups(grouped, block=1)
    with pytest.raises(AssertionError):
        starts.check_same_function(grouped, scrambled, batch)
    first, other = (model.model.layers[0].self_attn.k_proj.weight for model in (grouped, scrambled))
    assert torch.equal(other[: heads // groups], first[:1].expand(heads // groups, -1))
    student = starts.start_taylor("gated_deltanet", grouped, teacher, batch)
    linear = get_mixers(starts.start_taylor("gla", grouped, teacher, batch))
    for name, mixer in get_mixers(student).items():
        rate = torch.nn.functional.softplus(mixer.decay.bias)
        assert (math.log(2) / rate).min() >= 0.5 - 1e-5  # of a distance
        assert (math.log(2) / rate).max() <= 24
        # both students forget at the same rate, gla in each channel of a head
        gate = linear[name].decay_up.bias.unflatten(0, (heads, -1))
        of_channels = -torch.nn.functional.logsigmoid(gate.double()) / linear[name].options.temperature
        torch.testing.assert_close(of_channels, rate.double()[:, None].expand_as(of_channels), rtol=1e-4, atol=1e-6)
        strength = mixer.strength.bias.sigmoid()
        assert strength.min() == pytest.approx(0.3, abs=1e-4)
        assert strength.max() == pytest.approx(0.7, abs=1e-4)
        before, after = (model.get_submodule(name).v_proj.weight for model in (teacher, student))
        ratio = (after / before).unflatten(0, (heads, -1)).flatten(1)
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-5)  # one number a head
    gated = starts.start_gate("gated_deltanet", grouped, teacher, batch)
    for name, mixer in get_mixers(gated).items():
        module = gated.get_submodule(name)
        torch.testing.assert_close(mixer.gate.weight, (module.o_proj.weight.T + module.v_proj.weight) / 2)


def test_the_table_has_a_row_for_each_start(starts, teacher_folder, corpus, capsys, tmp_path, monkeypatch):
    words = ["--teacher", str(teacher_folder), "--data", str(corpus), "--length", "32", "--exam-text", str(corpus)]
    words += ["--exam-documents", "1", "--exam-tokens", "64", "--out", str(tmp_path / "rows")]
    starts.main([*words, "--tokens", "256,64"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert rows[0][2:5] == ["as it is", "stage 0, 64 tokens", "stage 0, 256 tokens"]
    assert [row[:2] for row in rows[1:]] == [
        [mixer, name] for mixer in ("gated_deltanet", "gla") for name in starts.STARTS
    ]
    assert all(float(cell.replace(",", "")) > 1 for row in rows[1:] for cell in row[2:5])
    measured = []
    examine = starts.examine
    monkeypatch.setattr(starts, "examine", lambda *given: measured.append(given) or examine(*given))
    starts.main([*words, "--tokens", "256,64"])
    assert capsys.readouterr().out == out
    assert measured == [], "finished rows are not measured again"
    starts.main([*words, "--tokens", "64", "--students", "gla", "--starts", "copied"])
    assert len(measured) == 3, "another budget is another row: as it is, with stage 0, and the teacher"
