"""Students as Hugging Face models: conversion, the attention function, the cache, saving and loading.

    from limbeck.models import convert, get_mixers
    student = convert(model, mixer="gla")

The public names are imported when they are first used: `import limbeck` goes through this file, and torch and
transformers take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.models.cache import RecurrentLayer, build_cache_kwargs, cache_bytes
    from limbeck.models.compiled_decoding import compile_decoding
    from limbeck.models.config import LimbeckConfig
    from limbeck.models.conversion import convert, count_parameters, count_student_parameters, unshare_weights
    from limbeck.models.layers import (
        format_ranges,
        group_layers_by_mixer,
        parse_layers,
        parse_softmax_layers,
        select_converted_layers,
    )
    from limbeck.models.modeling import LimbeckForCausalLM, get_mixers
    from limbeck.models.probe import Site, find_attention_sites

__all__ = [
    "LimbeckConfig",
    "LimbeckForCausalLM",
    "RecurrentLayer",
    "Site",
    "build_cache_kwargs",
    "cache_bytes",
    "compile_decoding",
    "convert",
    "count_parameters",
    "count_student_parameters",
    "find_attention_sites",
    "format_ranges",
    "get_mixers",
    "group_layers_by_mixer",
    "parse_layers",
    "parse_softmax_layers",
    "select_converted_layers",
    "unshare_weights",
]

_MODULES = {
    "cache": ["RecurrentLayer", "build_cache_kwargs", "cache_bytes"],
    "compiled_decoding": ["compile_decoding"],
    "config": ["LimbeckConfig"],
    "conversion": ["convert", "count_parameters", "count_student_parameters", "unshare_weights"],
    "layers": [
        "format_ranges",
        "group_layers_by_mixer",
        "parse_layers",
        "parse_softmax_layers",
        "select_converted_layers",
    ],
    "modeling": ["LimbeckForCausalLM", "get_mixers"],
    "probe": ["Site", "find_attention_sites"],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
