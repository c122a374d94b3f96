"""The kernels of flash-linear-attention that stand in for operators on CUDA (fla-core, MIT; extra `limbeck[cuda]`).

    adapter = find_adapter(call)          # the first that matches the operator, its form and the kind of decay, or None

Limits are those that fla-core 0.6 states or asserts: 256 key channels in the delta rules, which keep a whole key in one
block, and no float32 in kernels that refuse it or warn of it.
"""

from typing import Any

import torch

from limbeck.ops.fla.adapters import HALF_DTYPES, ConvolutionAdapter, KernelAdapter
from limbeck.ops.fla.call import OperatorCall

ALL_DTYPES = (*HALF_DTYPES, torch.float32)  # of kernels that multiply without matrix units
QKV = {"q": "q", "k": "k", "v": "v"}
MAX_KEY_WIDTH = {"K": 256}


def _chunked(
    name: str, operator: str, kernel: str, gates: dict[str, str], decay_kind: str | None, used_by: str, **limits: Any
) -> KernelAdapter:
    """Adapter of a chunked form; `gates` are the kernel's arguments besides q, k and v."""
    names = {**QKV, **gates}
    return KernelAdapter(
        name, operator, "chunked", f"fla.ops.{kernel}", names, used_by, decay_kind, aligned_dims="KV", **limits
    )


def _step(
    name: str, operator: str, kernel: str, gates: dict[str, str], decay_kind: str | None, used_by: str
) -> KernelAdapter:
    """Adapter of a recurrent form, which computes the next token."""
    return KernelAdapter(
        f"{name}_step",
        operator,
        "recurrent",
        f"fla.ops.{kernel}",
        {**QKV, **gates},
        f"the next token of {used_by}",
        decay_kind,
        dtypes=ALL_DTYPES,
        supports_backward=False,
        supports_varlen=False,
    )


DPLR = "diagonal_plus_rank_one"
BETA = {"beta": "beta"}
DPLR_GATES = {"a": "a", "b": "b", "log_decay": "gk"}
# A constant decay per head has an argument of its own.
SCALAR_GATES = {"log_decay": "g", "constant": "g_gamma"}
SLOT_GATES = {"write": "s", "log_decay": "g"}
GLA_MIXERS = "GLA, MetaLA, HGRN2, RWKV-6"
SCALAR_MIXERS = "linear attention and its feature maps, RetNet, Mamba-2, mLSTM, LoLCATs' linear part"

KERNEL_ADAPTERS: tuple[KernelAdapter, ...] = (
    _chunked(
        "scalar_decay",
        "scalar_decay",
        "simple_gla.chunk_simple_gla",
        SCALAR_GATES,
        "scalar or none",
        SCALAR_MIXERS,
        allows_tf32=True,
    ),
    _chunked(
        "vector_decay", "vector_decay", "gla.chunk_gla", {"log_decay": "g"}, "vector", GLA_MIXERS, allows_tf32=True
    ),
    _chunked("delta_rule", "delta_rule", "delta_rule.chunk_delta_rule", BETA, None, "DeltaNet", max_dims=MAX_KEY_WIDTH),
    _chunked(
        "gated_delta_rule",
        "delta_rule",
        "gated_delta_rule.chunk_gated_delta_rule",
        {**BETA, "log_decay": "g"},
        "scalar",
        "Gated DeltaNet",
        max_dims=MAX_KEY_WIDTH,
    ),
    _chunked("kda", "delta_rule", "kda.chunk_kda", {**BETA, "log_decay": "g"}, "vector", "KDA", max_dims=MAX_KEY_WIDTH),
    _chunked(
        DPLR,
        DPLR,
        "generalized_delta_rule.chunk_dplr_delta_rule",
        DPLR_GATES,
        "vector",
        "RWKV-7",
        max_dims=MAX_KEY_WIDTH,
    ),
    _chunked(
        "slot_attention",
        "slot_attention",
        "gsa.chunk_gsa",
        SLOT_GATES,
        "vector",
        "gated slot attention",
        allows_tf32=True,
    ),
    ConvolutionAdapter(
        "convolution",
        "convolution",
        "causal",
        "fla.modules.causal_conv1d.causal_conv1d",
        {},
        "the short convolution of all mixers",
        "any",
        dtypes=ALL_DTYPES,
    ),
    _step(
        "scalar_decay",
        "scalar_decay",
        "simple_gla.fused_recurrent_simple_gla",
        SCALAR_GATES,
        "scalar or none",
        "what scalar_decay serves",
    ),
    _step("vector_decay", "vector_decay", "gla.fused_recurrent_gla", {"log_decay": "gk"}, "vector", GLA_MIXERS),
    _step(
        "delta_rule",
        "delta_rule",
        "gated_delta_rule.fused_recurrent_gated_delta_rule",
        {**BETA, "log_decay": "g"},
        "scalar or none",
        "DeltaNet and Gated DeltaNet",
    ),
    _step(
        "kda",
        "delta_rule",
        "gated_delta_rule.fused_recurrent_gated_delta_rule",
        {**BETA, "log_decay": "gk"},
        "vector",
        "KDA",
    ),
    _step(DPLR, DPLR, "generalized_delta_rule.fused_recurrent_dplr_delta_rule", DPLR_GATES, "vector", "RWKV-7"),
    _step("slot_attention", "slot_attention", "gsa.fused_recurrent_gsa", SLOT_GATES, "vector", "gated slot attention"),
)


def find_adapter(call: OperatorCall) -> KernelAdapter | None:
    """Return the adapter for that kind of call, or None where there is no kernel for it."""
    return next((a for a in KERNEL_ADAPTERS if a.matches(call)), None)
