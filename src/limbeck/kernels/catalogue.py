"""The kernels of flash-linear-attention that stand in for operators on CUDA (fla-core, MIT; extra `limbeck[cuda]`).

    [adapter] = [a for a in ADAPTERS if a.fits(call)]

Limits are those that fla-core 0.6 states or asserts: 256 key channels in the delta rules, which keep a whole key in one
block; float32 refused or warned of by them. Gates of other kinds than an adapter's `decay` go to another one.
"""

import torch

from limbeck.kernels.adapters import HALF, Adapter, Convolution
from limbeck.kernels.calls import Call

EXACT = (*HALF, torch.float32)  # kernels that multiply without matrix units
QKV = {"q": "q", "k": "k", "v": "v"}

CHUNKED = (
    Adapter(
        "scalar_decay",
        "scalar_decay",
        "chunked",
        "fla.ops.simple_gla.chunk_simple_gla",
        {**QKV, "log_decay": "g", "constant": "g_gamma"},
        serves="linear attention and its feature maps, RetNet, Mamba-2, mLSTM, LoLCATs' linear part",
        decay="scalar or none",
        tf32=True,
        aligned="KV",
    ),
    Adapter(
        "vector_decay",
        "vector_decay",
        "chunked",
        "fla.ops.gla.chunk_gla",
        {**QKV, "log_decay": "g"},
        serves="GLA, MetaLA, HGRN2, RWKV-6",
        decay="vector",
        tf32=True,
        aligned="KV",
    ),
    Adapter(
        "delta_rule",
        "delta_rule",
        "chunked",
        "fla.ops.delta_rule.chunk_delta_rule",
        {**QKV, "beta": "beta"},
        serves="DeltaNet",
        widest={"K": 256},
        aligned="KV",
    ),
    Adapter(
        "gated_delta_rule",
        "delta_rule",
        "chunked",
        "fla.ops.gated_delta_rule.chunk_gated_delta_rule",
        {**QKV, "beta": "beta", "log_decay": "g"},
        serves="Gated DeltaNet",
        decay="scalar",
        widest={"K": 256},
        aligned="KV",
    ),
    Adapter(
        "kda",
        "delta_rule",
        "chunked",
        "fla.ops.kda.chunk_kda",
        {**QKV, "beta": "beta", "log_decay": "g"},
        serves="KDA",
        decay="vector",
        widest={"K": 256},
        aligned="KV",
    ),
    Adapter(
        "diagonal_plus_rank_one",
        "diagonal_plus_rank_one",
        "chunked",
        "fla.ops.generalized_delta_rule.chunk_dplr_delta_rule",
        {**QKV, "a": "a", "b": "b", "log_decay": "gk"},
        serves="RWKV-7",
        decay="vector",
        widest={"K": 256},
        aligned="KV",
    ),
    Adapter(
        "slot_attention",
        "slot_attention",
        "chunked",
        "fla.ops.gsa.chunk_gsa",
        {**QKV, "write": "s", "log_decay": "g"},
        serves="gated slot attention",
        decay="vector",
        tf32=True,
        aligned="KV",
    ),
    Convolution(
        "convolution",
        "convolution",
        "causal",
        "fla.modules.causal_conv1d.causal_conv1d",
        {},
        serves="the short convolution of all mixers",
        decay="any",
        dtypes=EXACT,
    ),
)


def _step(name: str, operator: str, kernel: str, names: dict[str, str], serves: str, decay: str | None) -> Adapter:
    return Adapter(
        f"{name}_step",
        operator,
        "recurrent",
        kernel,
        {**QKV, **names},
        serves,
        decay,
        dtypes=EXACT,
        gradient=False,
        documents=False,
    )


STEPS = (
    _step(
        "scalar_decay",
        "scalar_decay",
        "fla.ops.simple_gla.fused_recurrent_simple_gla",
        {"log_decay": "g", "constant": "g_gamma"},
        "the next token of what scalar_decay serves",
        "scalar or none",
    ),
    _step(
        "vector_decay",
        "vector_decay",
        "fla.ops.gla.fused_recurrent_gla",
        {"log_decay": "gk"},
        "the next token of GLA, MetaLA, HGRN2, RWKV-6",
        "vector",
    ),
    _step(
        "delta_rule",
        "delta_rule",
        "fla.ops.gated_delta_rule.fused_recurrent_gated_delta_rule",
        {"beta": "beta", "log_decay": "g"},
        "the next token of DeltaNet and Gated DeltaNet",
        "scalar or none",
    ),
    _step(
        "kda",
        "delta_rule",
        "fla.ops.gated_delta_rule.fused_recurrent_gated_delta_rule",
        {"beta": "beta", "log_decay": "gk"},
        "the next token of KDA",
        "vector",
    ),
    _step(
        "diagonal_plus_rank_one",
        "diagonal_plus_rank_one",
        "fla.ops.generalized_delta_rule.fused_recurrent_dplr_delta_rule",
        {"a": "a", "b": "b", "log_decay": "gk"},
        "the next token of RWKV-7",
        "vector",
    ),
    _step(
        "slot_attention",
        "slot_attention",
        "fla.ops.gsa.fused_recurrent_gsa",
        {"write": "s", "log_decay": "g"},
        "the next token of gated slot attention",
        "vector",
    ),
)
ADAPTERS: tuple[Adapter, ...] = CHUNKED + STEPS


def find(call: Call) -> Adapter | None:
    """The adapter for that kind of call, or None where no kernel does it."""
    return next((a for a in ADAPTERS if a.fits(call)), None)
