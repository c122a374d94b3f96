"""Students as Hugging Face models: conversion, the attention function, the cache, saving and loading."""

from limbeck.model.cache import RecurrentLayer, cache_bytes, with_cache
from limbeck.model.convert import convert, numel, parameter_report, unshare
from limbeck.model.layers import as_ranges, by_mixer, converted_layers, parse_keep, parse_layers
from limbeck.model.probe import Site, attention_sites
from limbeck.model.student import LimbeckConfig, LimbeckForCausalLM, mixers_of

__all__ = [
    "LimbeckConfig",
    "LimbeckForCausalLM",
    "RecurrentLayer",
    "Site",
    "as_ranges",
    "attention_sites",
    "by_mixer",
    "cache_bytes",
    "convert",
    "converted_layers",
    "mixers_of",
    "numel",
    "parameter_report",
    "parse_keep",
    "parse_layers",
    "unshare",
    "with_cache",
]
