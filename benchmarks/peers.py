"""Other people's torch code for the same recurrences, loaded at run time: transformers, flash-linear-attention, mLSTM.

    peers = chunked_peers()["delta_rule, scalar"]     # [Peer(name, run)]: run(inputs) -> outputs
    peers = step_peers()["delta_rule, scalar"]        # run(inputs, state) -> outputs and state

flash-linear-attention's `naive.py` files come from the package fla-core, whose own modules need Triton to be imported,
so the files are loaded by their path. mlstm_kernels (not an open-source licence) takes part where it is installed.
A peer that is not there is left out with a line saying so.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F


@dataclass
class Inputs:
    """q, k, v [B, T, H, 64], beta and scalar log decays [B, T, H], vector log decays [B, T, H, 64]; all leaves."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    scalar: torch.Tensor
    vector: torch.Tensor

    @classmethod
    def random(cls, length: int, heads: int, width: int, batch: int, grad: bool = True) -> "Inputs":
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(batch, length, heads, *shape)

        keys, scalar, vector = (
            F.normalize(normal(width), dim=-1),
            -F.softplus(normal() - 3),
            -F.softplus(normal(width) - 3),
        )
        tensors = (normal(width), keys, normal(width), normal().sigmoid(), scalar, vector)
        return cls(*(x.requires_grad_(grad) for x in tensors))

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.q, self.k, self.v, self.beta, self.scalar, self.vector]

    def heads_first(self, *names: str) -> list[torch.Tensor]:
        return [getattr(self, name).transpose(1, 2) for name in names]


@dataclass
class Peer:
    """name: whose code. run: the call. same: whether its outputs are ours up to a factor."""

    name: str
    run: Callable
    same: bool = True


def modeling(name: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def fla(operator: str) -> ModuleType:
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        raise ImportError("fla-core is not installed")
    path = Path(found.submodule_search_locations[0]) / "ops" / operator / "naive.py"
    spec = importlib.util.spec_from_file_location(f"naive_{operator}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(f"fla-core has no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def collect(offers: dict[str, list[tuple[str, Callable[[], Callable], bool]]]) -> dict[str, list[Peer]]:
    peers: dict[str, list[Peer]] = {}
    for operator, entries in offers.items():
        peers[operator] = []
        for name, load, same in entries:
            try:
                peers[operator].append(Peer(name, load(), same))
            except (ImportError, AttributeError) as problem:
                print(f"left out: {name} ({problem})")
    return peers


def chunked_peers() -> dict[str, list[Peer]]:
    """For forward and backward over a sequence whose length is a multiple of 64."""

    def qwen(gated: bool) -> Callable:
        f = modeling("qwen3_next").torch_chunk_gated_delta_rule
        return lambda x: f(x.q, x.k, x.v, x.scalar if gated else torch.zeros_like(x.scalar), x.beta, chunk_size=64)[0]

    def kimi() -> Callable:
        f = modeling("kimi_linear").chunk_kimi_delta_attention
        return lambda x: f(x.q, x.k, x.v, x.vector, x.beta)[0]

    def mamba2() -> Callable:
        f = modeling("mamba2").mamba2_chunk_scan  # it multiplies v by dt as well
        return lambda x: f(x.v, -x.scalar, -torch.ones(x.q.shape[2]), x.k, x.q, chunk_size=64)

    def xlstm() -> Callable:
        f = modeling("xlstm").mlstm_chunkwise_native_autograd  # it computes a normaliser as well
        return lambda x: f(*x.heads_first("q", "k", "v"), *mlstm_gates(x)).transpose(1, 2)

    def mlstm_kernels() -> Callable:
        module = importlib.import_module("mlstm_kernels.torch.chunkwise.native.fwbw")
        f = module.mlstm_chunkwise__native_custbw
        return lambda x: f(*x.heads_first("q", "k", "v"), *mlstm_gates(x)).transpose(1, 2)

    def mlstm_gates(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        gate = x.scalar.transpose(1, 2).contiguous()
        return torch.zeros_like(gate), gate

    def linear() -> Callable:
        f = fla("linear_attn").naive_chunk_linear_attn
        return lambda x: f(x.q, x.k, x.v)[0]

    def simple_gla() -> Callable:
        f = fla("simple_gla").naive_chunk_simple_gla
        return lambda x: f(x.q, x.k, x.v, x.scalar)[0]

    def gla() -> Callable:
        f = fla("gla").naive_recurrent_gla
        return lambda x: f(x.q, x.k, x.v, x.vector)[0]

    def delta() -> Callable:
        f = fla("delta_rule").delta_rule_chunkwise
        return lambda x: f(*x.heads_first("q", "k", "v", "beta"))[0].transpose(1, 2)

    def gated_delta() -> Callable:
        f = fla("gated_delta_rule").naive_chunk_gated_delta_rule
        return lambda x: f(x.q, x.k, x.v, x.scalar, x.beta)[0]

    def kda() -> Callable:
        f = fla("kda").naive_chunk_kda
        return lambda x: f(x.q, x.k, x.v, x.vector, x.beta)[0]

    return collect(
        {
            "scalar_decay, none": [("fla linear_attn", linear, True)],
            "scalar_decay, scalar": [
                ("fla simple_gla", simple_gla, True),
                ("hf Mamba-2", mamba2, False),
                ("hf xLSTM", xlstm, False),
                ("mlstm_kernels", mlstm_kernels, False),
            ],
            "vector_decay, vector": [("fla gla", gla, True)],
            "delta_rule, none": [("fla delta_rule", delta, True), ("hf Qwen3-Next", lambda: qwen(False), True)],
            "delta_rule, scalar": [
                ("hf Qwen3-Next", lambda: qwen(True), True),
                ("fla gated_delta_rule", gated_delta, True),
            ],
            "delta_rule, vector": [("hf Kimi", kimi, True), ("fla kda", kda, True)],
        }
    )


def step_peers() -> dict[str, list[Peer]]:
    """For one token, without gradients; the state is [B, H, K, V] in and out."""

    def recurrent(f: Callable, *names: str) -> Callable:
        def run(x: Inputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return f(x.q, x.k, x.v, *(getattr(x, n) for n in names), initial_state=state, output_final_state=True)

        return run

    def delta() -> Callable:
        f = fla("delta_rule").delta_rule_recurrence
        return lambda x, state: f(*x.heads_first("q", "k", "v", "beta"), initial_state=state)

    def mamba2() -> Callable:
        f, rates = modeling("mamba2").mamba2_selective_state_update, {}

        def run(x: Inputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            heads = x.q.shape[2]
            if heads not in rates:
                rates[heads] = -torch.ones(heads, 1, 1)
            return f(state, x.v[:, 0], -x.scalar[:, 0].unsqueeze(-1), rates[heads], x.k[:, 0], x.q[:, 0]), state

        return run

    def xlstm() -> Callable:
        f, rest = modeling("xlstm").mlstm_recurrent_step_native, {}

        def run(x: Inputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            q, k, v, gate = x.q[:, 0], x.k[:, 0], x.v[:, 0], x.scalar[:, 0].unsqueeze(-1)
            if state.shape not in rest:
                rest[state.shape] = (state.new_zeros(k.shape), state.new_zeros(gate.shape), torch.zeros_like(gate))
            n, m, write = rest[state.shape]
            o, (state, *_) = f(q, k, v, write, gate, state, n, m)
            return o, state

        return run

    return collect(
        {
            "scalar_decay, none": [
                ("fla linear_attn", lambda: recurrent(fla("linear_attn").naive_recurrent_linear_attn), True)
            ],
            "scalar_decay, scalar": [("hf Mamba-2", mamba2, False), ("hf xLSTM", xlstm, False)],
            "vector_decay, vector": [("fla gla", lambda: recurrent(fla("gla").naive_recurrent_gla, "vector"), True)],
            "delta_rule, none": [("fla delta_rule", delta, True)],
            "delta_rule, scalar": [
                (
                    "hf Qwen3-Next",
                    lambda: recurrent(modeling("qwen3_next").torch_recurrent_gated_delta_rule, "scalar", "beta"),
                    True,
                )
            ],
            "delta_rule, vector": [
                (
                    "hf Kimi",
                    lambda: recurrent(modeling("kimi_linear").recurrent_kimi_delta_attention, "vector", "beta"),
                    True,
                )
            ],
        }
    )
