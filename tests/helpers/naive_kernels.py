"""flash-linear-attention's reference functions behind the signatures of its Triton kernels.

    stand_in(monkeypatch)       # the adapters' kernels are these from now on, on CPU tensors and in float64 too

So what an adapter hands over (names, scales, layouts, states, offsets of documents) is checked to the last digit
without a GPU. Nothing of flash-linear-attention stands in this repository: it is read from the installed package.
"""

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.oracles import fla, swapped
from limbeck.ops.fla import adapters, catalogue, dispatch, verify


def stand_in(monkeypatch) -> None:
    """Kernels on CPU tensors of float64 too, computed by the reference functions."""
    monkeypatch.setattr(adapters, "import_kernel", lambda path: KERNELS[path.rpartition(".")[2]])
    wide = tuple(dataclasses.replace(a, dtypes=(*a.dtypes, torch.float64)) for a in catalogue.KERNEL_ADAPTERS)
    monkeypatch.setattr(catalogue, "KERNEL_ADAPTERS", wide)
    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", {"cpu"})
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda: None)
    monkeypatch.setattr(verify, "_KERNEL_CHECKS", {})
    dispatch.clear_dispatch_log()


def one_row_each(kernel: Callable) -> Callable:
    """A kernel for whole rows as one for documents at the offsets `cu_seqlens` of a single row."""

    def run(*, cu_seqlens=None, initial_state=None, **given):
        if cu_seqlens is None:
            return kernel(initial_state=initial_state, **given)
        ends = cu_seqlens.tolist()
        outputs, states = [], []
        for n, (begin, end) in enumerate(itertools.pairwise(ends)):
            cut = {k: x[:, begin:end] if torch.is_tensor(x) and len(x) == 1 else x for k, x in given.items()}
            several = isinstance(initial_state, tuple)
            own = tuple(s[n : n + 1] for s in (initial_state if several else [initial_state]) if s is not None)
            o, state = kernel(initial_state=own if several else (own[0] if own else None), **cut)
            outputs.append(o)
            states.append(state)
        if isinstance(states[0], tuple):
            return torch.cat(outputs, 1), tuple(torch.cat(s) for s in zip(*states, strict=True))
        return torch.cat(outputs, 1), torch.cat(states)

    return run


def simple_gla(*, q, k, v, g=None, g_gamma=None, scale, initial_state, output_final_state):
    decay = torch.zeros_like(q[..., 0])
    decay = decay + (0 if g is None else g) + (0 if g_gamma is None else g_gamma)
    naive = fla("simple_gla/naive.py", "naive_recurrent_simple_gla")
    return naive(q, k, v, decay, scale, initial_state, output_final_state)


def gla(*, q, k, v, scale, initial_state, output_final_state, g=None, gk=None):
    naive = fla("gla/naive.py", "naive_recurrent_gla")
    return naive(q * scale * q.shape[-1] ** 0.5, k, v, gk if g is None else g, initial_state, output_final_state)


def delta_rule(*, q, k, v, beta, scale, initial_state, output_final_state):
    naive = fla("delta_rule/naive.py", "delta_rule_recurrence")
    o, state = naive(*swapped(q * scale * q.shape[-1] ** 0.5, k, v, beta), initial_state, output_final_state)
    return o.transpose(1, 2), state


def gated_delta_rule(*, q, k, v, beta, scale, initial_state, output_final_state, g=None, gk=None):
    if gk is not None:
        return kda(q=q, k=k, v=v, g=gk, beta=beta, scale=scale, initial_state=initial_state, output_final_state=True)
    naive = fla("gated_delta_rule/naive.py", "naive_recurrent_gated_delta_rule")
    g = torch.zeros_like(beta) if g is None else g
    return naive(q, k, v, beta, g, scale, initial_state, output_final_state)


def kda(*, q, k, v, g, beta, scale, initial_state, output_final_state):
    return fla("kda/naive.py", "naive_recurrent_kda")(q, k, v, g, beta, scale, initial_state, output_final_state)


def dplr(*, q, k, v, a, b, gk, scale, initial_state, output_final_state):
    naive = fla("generalized_delta_rule/dplr/naive.py", "dplr_recurrence")
    q = q * scale * q.shape[-1] ** 0.5
    o, state = naive(*swapped(q, k, v, a, b, gk), initial_state, output_final_state)
    return o.transpose(1, 2), state


def gsa(*, q, k, v, s, g, scale, initial_state, output_final_state):
    naive = fla("gsa/naive.py", "naive_recurrent_gsa")
    return naive(q, k, v, s, g, scale, initial_state or None, output_final_state)


def conv1d(*, x, weight, initial_state, output_final_state, backend):
    """As torch has it: x [B, T, D], weight [D, W], states [B, D, W] the oldest input of which no window sees."""
    width = weight.shape[1]
    history = torch.cat([initial_state, x.mT], -1)
    y = F.conv1d(history[..., 1:], weight.unsqueeze(1), groups=len(weight)).mT
    return y, history[..., -width:]


KERNELS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "chunk_simple_gla": one_row_each(simple_gla),
    "chunk_gla": one_row_each(gla),
    "chunk_delta_rule": one_row_each(delta_rule),
    "chunk_gated_delta_rule": one_row_each(gated_delta_rule),
    "chunk_kda": one_row_each(kda),
    "chunk_dplr_delta_rule": one_row_each(dplr),
    "chunk_gsa": one_row_each(gsa),
    "causal_conv1d": one_row_each(conv1d),
    "fused_recurrent_simple_gla": simple_gla,
    "fused_recurrent_gla": gla,
    "fused_recurrent_gated_delta_rule": gated_delta_rule,
    "fused_recurrent_dplr_delta_rule": dplr,
    "fused_recurrent_gsa": gsa,
}
