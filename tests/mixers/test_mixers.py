"""What single mixers and the switches do beyond the contract."""

import pytest
import torch

from limbeck import LimbeckError, mixers
from limbeck.mixers import HeadShape

SHAPE = HeadShape(hidden=48, heads=6, kv_heads=2, key_width=8, value_width=8, scale=8**-0.5, layers=2)


def given(length: int = 12) -> tuple[torch.Tensor, ...]:
    make = torch.Generator().manual_seed(0)
    shapes = ((6, 8), (2, 8), (2, 8), (48,))
    return tuple(torch.randn(2, length, *s, generator=make, dtype=torch.float64) for s in shapes)


def test_merged_heads_share_one_state_and_one_matrix():
    mixer = mixers.build("gla", SHAPE, {"heads": 2}).double()
    y, state = mixer(*given())
    assert state["memory"].shape == (2, 2, 24, 24)
    assert y.shape == (2, 12, 6, 8)
    matrix = mixer.forward_matrix(*given())[1]
    assert matrix.shape == (2, 6, 12, 12)
    assert torch.equal(matrix[:, 0], matrix[:, 2])
    with pytest.raises(LimbeckError, match="a divisor of 6"):
        mixers.build("gla", SHAPE, {"heads": 4})


@pytest.mark.parametrize("state", [1.0, 2.0])
def test_a_wider_state_starts_with_the_same_products(state):
    """The learned maps of q and k have orthonormal rows."""
    plain, wide = (mixers.build("retnet", SHAPE, {"state": s}).double() for s in (0.0, state))
    a, b = (m.forward_matrix(*given())[1] for m in (plain, wide))
    assert torch.allclose(a, b, atol=1e-6)
    assert wide.memory_numel() == state * plain.memory_numel()


@pytest.mark.parametrize("name", [n for n in mixers.list_mixers() if "state" in mixers.get(n).controlled])
def test_controlled_students_have_states_of_one_size(name):
    shape = HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64, scale=0.125, layers=30)
    size = mixers.build(name, shape, preset="controlled").state_numel()
    assert 0.8 < size / (9 * 64 * 64) < 1.05


def test_every_option_of_a_preset_is_known():
    for name in mixers.list_mixers():
        for preset in mixers.PRESETS:
            assert mixers.resolve_options(name, preset=preset)


def test_given_options_override_the_preset():
    assert mixers.resolve_options("gla", {"rope": True}, preset="published").rope
    assert not mixers.resolve_options("gla", preset="published").rope
    with pytest.raises(LimbeckError, match="did you mean 'published'"):
        mixers.resolve_options("gla", preset="publish")


def test_sets_and_selections():
    assert mixers.select_mixers("gla, kda,gla") == ["gla", "kda"]
    assert len(mixers.select_mixers("paper-v2")) == 8
    assert len(mixers.select_mixers("paper-v3")) == 7
    with pytest.raises(LimbeckError, match="unknown mixer 'paper-v4'"):
        mixers.select_mixers("paper-v4")
    with pytest.raises(LimbeckError, match="no mixer given"):
        mixers.select_mixers(",")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"conv": 1}, "is 1"), ({"conv": -4}, "is -4"), ({"state": 0.01}, "is 0.01"), ({"gate_rank": -1}, "is -1")],
)
def test_impossible_switches(options, message):
    with pytest.raises(LimbeckError, match=message):
        mixers.build("gla", SHAPE, options)


def test_a_map_whose_weights_change_sign_is_not_normalised():
    for name in ("identity", "hadamard"):
        with pytest.raises(LimbeckError, match="weights change sign"):
            mixers.build("linear_attention", SHAPE, {"feature_map": name})


def test_matrices_are_drawn_beside_the_teachers(tmp_path, teacher_folder, corpus, own_cache):
    pytest.importorskip("matplotlib")
    from typer.testing import CliRunner

    from limbeck.cli import app, matrices, students  # noqa: F401

    picture = tmp_path / "sub" / "m.png"
    # without --layer: the first of two
    command = ["matrices", str(picture), "--teacher", str(teacher_folder), "--data", str(corpus)]
    command += ["--students", "retnet,softmax", "--seq-len", "32", "--steps", "3"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = {line.split()[0]: line.split()[1:] for line in done.output.splitlines() if line.strip()}
    # softmax starts at the teacher's matrices; where a CPU rounds the two otherwise, Adam makes a step of the rounding
    assert float(rows["softmax"][0]) < 0.03 < float(rows["retnet"][0]) < 1
    for wrong, message in ((["--layer", "9"], "layer is 9"), (["--head", "9"], "head is 9")):
        failed = CliRunner().invoke(app, command + wrong)
        assert message in str(failed.exception)
        assert "steps" not in failed.output, "found out before any work"
