"""Students as Hugging Face models: conversion, the attention function, the cache, saving and loading."""

from limbeck.model.cache import RecurrentLayer, cache_bytes
from limbeck.model.convert import convert, numel, parameter_report, parse_layers, unshare
from limbeck.model.probe import Site, attention_sites
from limbeck.model.student import LimbeckConfig, LimbeckForCausalLM, mixers_of

__all__ = [
    "LimbeckConfig",
    "LimbeckForCausalLM",
    "RecurrentLayer",
    "Site",
    "attention_sites",
    "cache_bytes",
    "convert",
    "mixers_of",
    "numel",
    "parameter_report",
    "parse_layers",
    "unshare",
]
