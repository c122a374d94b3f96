"""Students as Hugging Face models: conversion, the attention function, the cache, saving and loading."""

from limbeck.core.model_type import LimbeckConfig
from limbeck.models.cache import RecurrentLayer, build_cache_kwargs, cache_bytes
from limbeck.models.convert import convert, count_parameters, count_student_parameters, unshare_weights
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
