"""The two halves of a causal language model, run separately: the backbone on packed documents, the head on some tokens.

    hidden = run_backbone(model, batch)             # [B, T, D], documents kept apart, no logits
    logits = LMHead(model)(hidden[0, -4:])          # [4, vocabulary]

Neither contains code for particular families: what a family supports is found by trying.
"""

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from limbeck.data.packing import Batch
from limbeck.models.packed import attach_documents, packed_attention, supports_packed_attention
from limbeck.models.temporary import exclusive_access, instance_attribute
from limbeck.ops.common import disable_autocast


def build_model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """Return the keyword arguments with which `model` keeps the documents of a packed batch apart."""
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if not supports_packed_positions(model):
        segments = (batch.position_ids == 0).cumsum(1)
        length = segments.shape[1]
        same_document = segments[:, :, None] == segments[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
        mask = (same_document & causal)[:, None]
        if model.config._attn_implementation == "eager":  # which adds its mask to the scores
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
        inputs["attention_mask"] = mask
    return inputs


def supports_packed_positions(model: PreTrainedModel) -> bool:
    """Return whether positions that restart keep packed documents apart; found by trying, once per model."""
    supported: bool | None = getattr(model, "_limbeck_packs", None)
    if supported is None:
        device = next(model.parameters()).device
        ids = torch.tensor([[3, 4, 5, 6]], device=device)
        positions = torch.tensor([[0, 1, 0, 1]], device=device)
        # without autocast: in bf16 two equal passes may differ by more than the tolerance
        with exclusive_access(model), torch.no_grad(), disable_autocast(ids):
            both = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            alone = model.get_decoder()(input_ids=ids[:, 2:], position_ids=positions[:, 2:], use_cache=False)
        supported = bool(torch.allclose(both[:, 2:], alone.last_hidden_state, rtol=1e-3, atol=1e-3))
        model._limbeck_packs = supported  # type: ignore[assignment]
    if supported and model.device.type != "cpu":
        supports_packed_attention(model)  # runs its trial pass now, before any hook is on the model
    return supported


def run_backbone(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Compute the hidden states [B, T, D] that go into the head, with packed documents kept apart.

    If the batch has its document boundaries, as one on an accelerator does, no mask is made where none is needed.
    """
    if batch.metadata is not None:
        attach_documents(batch)
    if batch.metadata is not None and supports_packed_positions(model) and supports_packed_attention(model):
        with packed_attention(model, batch):
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
            return model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return model.get_decoder()(**build_model_inputs(model, batch), use_cache=False).last_hidden_state


@torch.no_grad()
def find_final_norm(model: PreTrainedModel, last_block: str) -> nn.Module:
    """Return the module between the last block and the head, found by trying; the identity if there is none.

    Args:
        last_block: name of the last decoder block.
    """
    backbone, after_last = model.get_decoder(), False
    outputs: list[tuple[nn.Module, Tensor]] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if after_last and isinstance(output, Tensor):
            outputs.append((module, output))

    def note(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal after_last
        after_last = True

    ids = torch.tensor([[3, 4]], device=next(model.parameters()).device)
    with exclusive_access(model), disable_autocast(ids):
        block = model.get_submodule(last_block)
        handles = [block.register_forward_hook(note)]
        handles += [module.register_forward_hook(record) for module in backbone.modules() if module is not block]
        try:
            last = backbone(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
    for module, output in outputs:
        if output.numel() == last.numel() and output.reshape_as(last).equal(last):
            return module
    return nn.Identity()


@dataclass
class _BackboneOutput(BaseModelOutputWithPastAndCrossAttentions):
    router_logits: None = None  # read by mixtures of experts


class LMHead:
    """Turns hidden states into logits as the family does (soft cap, scale, bias).

    It runs the model's own forward pass with the backbone replaced by the given hidden states.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @cached_property
    def weight(self) -> nn.Parameter | None:
        """W [vocabulary, D] if the head computes hidden · Wᵀ and nothing else (found by trying), otherwise None."""
        last = self.model.get_output_embeddings()
        if type(last) is not nn.Linear or last.bias is not None or type(last.weight) is not nn.Parameter:
            return None
        with torch.no_grad(), torch.autocast(last.weight.device.type, enabled=False):
            # large enough for a soft cap to make a difference
            hidden = 30 * torch.linspace(-1, 1, 2 * last.in_features).cos().view(2, -1).to(last.weight)
            logits = self(hidden)
            linear = F.linear(hidden, last.weight)
        is_linear = logits.shape == linear.shape and torch.allclose(logits, linear, rtol=1e-4, atol=1e-4)
        return last.weight if is_linear else None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute logits [N, vocabulary] of hidden states [N, D]."""
        backbone: Any = self.model.get_decoder()
        output, thread = _BackboneOutput(last_hidden_state=hidden[None]), threading.get_ident()
        with exclusive_access(backbone):
            original = backbone.forward

            def forward(*args, **kwargs):
                # passes of other threads over a shared model run as usual
                return output if threading.get_ident() == thread else original(*args, **kwargs)

            with instance_attribute(backbone, "forward", forward):
                return self.model(input_ids=hidden.new_zeros(1, 1, dtype=torch.long), use_cache=False).logits[0]
