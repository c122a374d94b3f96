"""The two halves of a causal language model, run apart: the body on packed documents, and the head on a few tokens.

    hidden = run_backbone(model, batch)                # [B, T, D], documents kept apart, no logits
    logits = LMHead(model)(hidden[0, -4:])           # [4, vocabulary]

Neither knows anything of a family.
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
from limbeck.models.packed import attach_documents, exclusive_access, packed_attention, supports_packed_attention
from limbeck.ops.common import disable_autocast


def build_model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """The keyword arguments under which `model` keeps the documents of a packed batch apart."""
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if not supports_packed_positions(model):
        index = (batch.position_ids == 0).cumsum(1)
        length = index.shape[1]
        joined = index[:, :, None] == index[:, None, :]
        allowed = (joined & torch.ones(length, length, dtype=torch.bool, device=index.device).tril())[:, None]
        if model.config._attn_implementation == "eager":
            closed = torch.finfo(model.dtype).min
            allowed = torch.zeros_like(allowed, dtype=model.dtype).masked_fill(~allowed, closed)
        inputs["attention_mask"] = allowed
    return inputs


def supports_packed_positions(model: PreTrainedModel) -> bool:
    """Does this family keep packed documents apart when positions restart? Found by trying, once per model."""
    known: bool | None = getattr(model, "_limbeck_packs", None)
    if known is None:
        device = next(model.parameters()).device
        ids = torch.tensor([[3, 4, 5, 6]], device=device)
        positions = torch.tensor([[0, 1, 0, 1]], device=device)
        with (
            exclusive_access(model),
            torch.no_grad(),
            disable_autocast(ids),
        ):  # in bf16 two equal passes may differ by more than is allowed here
            both = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            alone = model.get_decoder()(input_ids=ids[:, 2:], position_ids=positions[:, 2:], use_cache=False)
        known = bool(torch.allclose(both[:, 2:], alone.last_hidden_state, rtol=1e-3, atol=1e-3))
        model._limbeck_packs = known  # type: ignore[assignment]
    if known and model.device.type != "cpu":
        supports_packed_attention(model)  # tries the model as well, once, where no visitor is at work yet
    return known


def run_backbone(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states [B, T, D] that go into the head.

    Where the batch knows its documents' ends, as one on an accelerator does, no mask is made if none is needed.
    """
    if batch.metadata is not None:
        attach_documents(batch)
    if batch.metadata is not None and supports_packed_positions(model) and supports_packed_attention(model):
        with packed_attention(model, batch):
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
            return model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return model.get_decoder()(**build_model_inputs(model, batch), use_cache=False).last_hidden_state


@dataclass
class _Given(BaseModelOutputWithPastAndCrossAttentions):
    router_logits: None = None  # mixtures of experts hand them on


class LMHead:
    """What turns hidden states into logits, with every family's own extras (soft cap, scale, bias), on a few tokens.

    It is the model's own forward pass with the body's place taken by the given hidden states, so nothing about a family
    has to be known.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @cached_property
    def weight(self) -> nn.Parameter | None:
        """W [vocabulary, D] of a head that is hidden · Wᵀ and nothing else, found by trying; None of any other."""
        last = self.model.get_output_embeddings()
        if type(last) is not nn.Linear or last.bias is not None or type(last.weight) is not nn.Parameter:
            return None
        with torch.no_grad(), torch.autocast(last.weight.device.type, enabled=False):
            hidden = 30 * torch.linspace(-1, 1, 2 * last.in_features).cos().view(2, -1).to(
                last.weight
            )  # soft caps show
            logits = self(hidden)
            plain = F.linear(hidden, last.weight)
        same = logits.shape == plain.shape and torch.allclose(logits, plain, rtol=1e-4, atol=1e-4)
        return last.weight if same else None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, vocabulary]."""
        body: Any = self.model.get_decoder()
        output, own = _Given(last_hidden_state=hidden[None]), threading.get_ident()
        with exclusive_access(body):
            usual, set_by_others = body.forward, vars(body).get("forward")  # accelerate hangs its hooks there

            def forward(*args, **kwargs):
                return output if threading.get_ident() == own else usual(*args, **kwargs)

            body.forward = forward
            try:
                return self.model(input_ids=hidden.new_zeros(1, 1, dtype=torch.long), use_cache=False).logits[0]
            finally:
                if set_by_others is None:
                    del body.forward
                else:
                    body.forward = set_by_others
