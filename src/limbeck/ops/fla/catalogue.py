"""The kernels of flash-linear-attention that stand in for operators on CUDA (fla-core, MIT; extra `limbeck[cuda]`).

    [adapter] = [a for a in ADAPTERS if a.fits(call)]

Limits are those that fla-core 0.6 states or asserts: 256 key channels in the delta rules, which keep a whole key in one
block; float32 refused or warned of by them. Gates of other kinds than an adapter's `decay_kind` go to another one.
"""

import torch

from limbeck.ops.fla.adapters import HALF_DTYPES, ConvolutionAdapter, KernelAdapter
from limbeck.ops.fla.call import OperatorCall

EXACT = (*HALF_DTYPES, torch.float32)  # kernels that multiply without matrix units
QKV = {"q": "q", "k": "k", "v": "v"}

CHUNKED = (
    KernelAdapter(
        "scalar_decay",
        "scalar_decay",
        "chunked",
        "fla.ops.simple_gla.chunk_simple_gla",
        {**QKV, "log_decay": "g", "constant": "g_gamma"},
        used_by="linear attention and its feature maps, RetNet, Mamba-2, mLSTM, LoLCATs' linear part",
        decay_kind="scalar or none",
        allows_tf32=True,
        aligned_dims="KV",
    ),
    KernelAdapter(
        "vector_decay",
        "vector_decay",
        "chunked",
        "fla.ops.gla.chunk_gla",
        {**QKV, "log_decay": "g"},
        used_by="GLA, MetaLA, HGRN2, RWKV-6",
        decay_kind="vector",
        allows_tf32=True,
        aligned_dims="KV",
    ),
    KernelAdapter(
        "delta_rule",
        "delta_rule",
        "chunked",
        "fla.ops.delta_rule.chunk_delta_rule",
        {**QKV, "beta": "beta"},
        used_by="DeltaNet",
        max_dims={"K": 256},
        aligned_dims="KV",
    ),
    KernelAdapter(
        "gated_delta_rule",
        "delta_rule",
        "chunked",
        "fla.ops.gated_delta_rule.chunk_gated_delta_rule",
        {**QKV, "beta": "beta", "log_decay": "g"},
        used_by="Gated DeltaNet",
        decay_kind="scalar",
        max_dims={"K": 256},
        aligned_dims="KV",
    ),
    KernelAdapter(
        "kda",
        "delta_rule",
        "chunked",
        "fla.ops.kda.chunk_kda",
        {**QKV, "beta": "beta", "log_decay": "g"},
        used_by="KDA",
        decay_kind="vector",
        max_dims={"K": 256},
        aligned_dims="KV",
    ),
    KernelAdapter(
        "diagonal_plus_rank_one",
        "diagonal_plus_rank_one",
        "chunked",
        "fla.ops.generalized_delta_rule.chunk_dplr_delta_rule",
        {**QKV, "a": "a", "b": "b", "log_decay": "gk"},
        used_by="RWKV-7",
        decay_kind="vector",
        max_dims={"K": 256},
        aligned_dims="KV",
    ),
    KernelAdapter(
        "slot_attention",
        "slot_attention",
        "chunked",
        "fla.ops.gsa.chunk_gsa",
        {**QKV, "write": "s", "log_decay": "g"},
        used_by="gated slot attention",
        decay_kind="vector",
        allows_tf32=True,
        aligned_dims="KV",
    ),
    ConvolutionAdapter(
        "convolution",
        "convolution",
        "causal",
        "fla.modules.causal_conv1d.causal_conv1d",
        {},
        used_by="the short convolution of all mixers",
        decay_kind="any",
        dtypes=EXACT,
    ),
)


def _step(
    name: str, operator: str, kernel: str, names: dict[str, str], serves: str, decay: str | None
) -> KernelAdapter:
    return KernelAdapter(
        f"{name}_step",
        operator,
        "recurrent",
        kernel,
        {**QKV, **names},
        serves,
        decay,
        dtypes=EXACT,
        supports_backward=False,
        supports_varlen=False,
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
KERNEL_ADAPTERS: tuple[KernelAdapter, ...] = CHUNKED + STEPS


def find_adapter(call: OperatorCall) -> KernelAdapter | None:
    """The adapter for that kind of call, or None where no kernel does it."""
    return next((a for a in KERNEL_ADAPTERS if a.matches(call)), None)
