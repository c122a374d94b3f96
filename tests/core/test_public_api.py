"""The doors for outsiders: what may be imported from limbeck, limbeck.mixers and limbeck.testing."""

import ast
from importlib import import_module

import pytest

from limbeck.models.modeling import REMOTE_CODE
from limbeck.models.registration import OLD_MODULES

DOORS = {
    "limbeck": """
        LimbeckConfig LimbeckError LimbeckForCausalLM Recipe __version__ cache_bytes convert distill evaluate load
    """,
    "limbeck.mixers": """
        PRESETS HeadShape Inputs Mixer Options State Tokens build get list_mixer_sets list_mixers register
        resolve_options select_mixers
    """,
    "limbeck.testing": """
        CHECKS FAMILIES QUICK_FAMILIES Check CheckResult MixerVariant list_cases make_tiny_model run_checks
    """,
}


@pytest.mark.parametrize("door", DOORS)
def test_what_may_be_imported(door):
    module = import_module(door)
    assert sorted(module.__all__) == sorted(DOORS[door].split())
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)


def test_saved_students_import_from_the_first_door_alone():
    """No later move of a module may break a checkpoint."""
    imports = [node for node in ast.walk(ast.parse(REMOTE_CODE)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in imports] == ["limbeck"]
    assert {alias.name for node in imports for alias in node.names} <= set(DOORS["limbeck"].split())


@pytest.mark.parametrize(("old", "new"), OLD_MODULES.items())
def test_old_paths_that_stand_in_files_lead_to_the_new(old, new):
    assert import_module(old).__name__ == old
    assert import_module(new).__name__ == new
    assert import_module(new).__spec__.name == new


def test_names_of_old_paths():
    from limbeck.evaluate.token_f1 import score_answers  # noqa: F401
    from limbeck.model.student import LimbeckConfig, LimbeckForCausalLM

    import limbeck

    assert LimbeckConfig is limbeck.LimbeckConfig
    assert LimbeckForCausalLM is limbeck.LimbeckForCausalLM


def test_names_that_mixers_of_0_1_have():
    from limbeck.mixers import Mixer
    from limbeck.ops import convolution, diagonal_plus_rank_one, dplr, short_conv

    class Old(Mixer):
        normalised = True

    assert Old.normalized
    assert not Mixer.normalized
    assert (convolution, diagonal_plus_rank_one) == (short_conv, dplr)
