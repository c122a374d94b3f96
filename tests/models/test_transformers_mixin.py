"""transformers' own tests of generation, on students.

LIMBECK_TRANSFORMERS_SOURCE=~/transformers pytest tests/models/test_transformers_mixin.py

The folder is a checkout of transformers whose version is near the installed one. Its mixin of generation tests is no
part of the wheel and is read from there; without the variable there is one skipped test.
"""

import copy
import functools
import importlib.util
import os
import sys
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import GenerationMixin

import limbeck
from limbeck.models import RecurrentLayer, get_mixers
from limbeck.testing import make_tiny_model

VARIABLE = "LIMBECK_TRANSFORMERS_SOURCE"
FILE = "tests/generation/test_utils.py"
# tests of the mixin that ask for what no student can do, with the reason
CANNOT = {
    "test_assisted_decoding_matches_greedy_search": "drops tokens again: refused, see test_generation.py",
    "test_assisted_decoding_sample": "drops tokens again: refused, see test_generation.py",
    "test_prompt_lookup_decoding_matches_greedy_search": "drops tokens again: refused, see test_generation.py",
    "test_prompt_lookup_decoding_stops_at_eos": "drops tokens again: refused, see test_generation.py",
    "test_custom_4d_attention_mask": "texts that branch from a shared beginning: refused, see test_generation.py",
}


class _AnyMark:
    """In the place of pytest.mark while their file is read: its marks are not known here."""

    def __getattr__(self, name):
        return lambda function: function


def _mixin() -> tuple[type | None, str]:
    """The mixin, or None and why there is none."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None, f"{VARIABLE} names no checkout of transformers"
    file = Path(folder).expanduser() / FILE
    if not file.is_file():
        return None, f"{VARIABLE} is {folder}, and there is no {FILE} in it"
    if importlib.util.find_spec("parameterized") is None:
        return None, "transformers' tests need the package parameterized"
    name = "limbeck_transformers_generation_tests"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with mock.patch.object(pytest, "mark", _AnyMark()):
        spec.loader.exec_module(module)
    return module.GenerationTesterMixin, ""


MIXIN, REASON = _mixin()


class Inputs:
    """What the mixin takes configs and inputs from."""

    batch_size, seq_length, is_training = 4, 7, False

    def __init__(self, parent: unittest.TestCase, config):
        self.parent, self.config = parent, config
        self.vocab_size = config.vocab_size

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return copy.deepcopy(self.config), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril(3)}


class Students:
    """Beside the mixin: a family's students, and checks of a cache that need not grow."""

    family, mixer, keep = "llama", "gated_deltanet", "none"
    has_attentions = True  # says to the mixin that there are masks and padding

    def setUp(self):
        student = _student(self.family, self.mixer, self.keep)
        self.all_model_classes = self.all_generative_model_classes = (type(student),)
        self.model_tester = Inputs(self, student.config)
        # some have a number behind their name
        reason = next((why for name, why in CANNOT.items() if self._testMethodName.startswith(name)), None)
        if reason:
            self.skipTest(reason)

    def test_inherits_generation_mixin(self):
        """Theirs looks at the first bases only."""
        for model_class in self.all_generative_model_classes:
            assert issubclass(model_class, GenerationMixin)

    def _check_attentions_for_generate(self, attentions, prompt_length, output_length, **kwargs):
        """There are no weights: no mixer has any, and softmax layers that stay run on SDPA."""
        assert len(attentions) == output_length - prompt_length
        assert all(weights is None for step in attentions for weights in step)

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        """Converted layers hold what their mixer says, whatever the length; the others keys and values as ever."""
        student = _student(self.family, self.mixer, self.keep)
        converted = {student.get_submodule(n).layer_idx: mixer for n, mixer in get_mixers(student).items()}
        assert len(past_key_values) == config.num_hidden_layers
        for index, layer in enumerate(past_key_values.layers):
            assert isinstance(layer, RecurrentLayer) == (index in converted)
            if index in converted:
                held = sum(t.numel() for state in layer.states for t in state.values())
                assert held == batch_size * converted[index].state_numel()
            else:
                shape = (batch_size, config.num_key_value_heads, seq_length, config.head_dim)
                assert (layer.keys.shape, layer.values.shape) == (shape, shape)

    def _check_caches_are_equal(self, cache1, cache2):
        assert len(cache1) == len(cache2)
        for one, other in zip(cache1.layers, cache2.layers):
            assert type(one) is type(other)
            assert int(one.get_seq_length()) == int(other.get_seq_length())
            if isinstance(one, RecurrentLayer):
                torch.testing.assert_close(one.states, other.states)
            else:
                torch.testing.assert_close([one.keys, one.values], [other.keys, other.values])


@functools.cache
def _student(family: str, mixer: str, keep: str):
    return limbeck.convert(make_tiny_model(family), mixer, softmax_layers=keep)


if MIXIN is None:

    @pytest.mark.skip(reason=REASON)
    def test_generation_as_transformers_tests_it():
        """Stands for all that follows."""

else:

    class TestLlama(Students, MIXIN, unittest.TestCase):
        family, mixer = "llama", "gated_deltanet"

    class TestQwen3(Students, MIXIN, unittest.TestCase):
        family, mixer = "qwen3", "gla"

    class TestLlamaByLayers(Students, MIXIN, unittest.TestCase):
        family, mixer, keep = "llama", "mamba2", "0"
