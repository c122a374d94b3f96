"""The whole contract on the mixer of this package, and what is its own."""

import pytest
import torch

from limbeck import mixers, testing

LIGHTNING = testing.MixerVariant("lightning")


@pytest.mark.parametrize(("check", "family"), testing.list_cases())
def test_contract(check, family):
    testing.CHECKS[check](LIGHTNING, family)


def test_decays_are_the_papers():
    shape = mixers.HeadShape(hidden=8, heads=8, kv_heads=8, key_width=1, value_width=1, layer=1, layers=3)
    module = mixers.build("lightning", shape, {"output_norm": "none", "output_gate": "none"})
    one = torch.ones(1, 2, 8, 1)
    matrix = module.forward_matrix(one, one, one, torch.ones(1, 2, 8))[1]
    expected = [-0.5 * 2.0**-h for h in range(1, 9)]  # half rate in the middle of three layers
    torch.testing.assert_close(matrix[0, :, 1, 0].log(), torch.tensor(expected))
