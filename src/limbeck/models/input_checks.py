"""Checks of a student's inputs before its first layer, and the attention weights in its output.

    register_input_checks(student)      # once, when the mixers are in place: hooks on the backbone, run by every call

A cache that lacks what the student needs raises LimbeckError: one rebuilt from keys and values, one in which only the
softmax layers are filled, one for another number of sequences. Documents packed into one row are kept apart where their
positions restart (or by `cu_seq_lens_q`, `seq_idx`): transformers looks at positions only if there is neither a cache
nor a mask, so both are left out of such a call.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils import ModelOutput

from limbeck.core.errors import LimbeckError
from limbeck.mixers.base import Mixer
from limbeck.models.attention import bind_arguments, output_attentions_requested
from limbeck.models.backbone import supports_packed_positions
from limbeck.models.cache import RecurrentLayer, check_layer_is_empty
from limbeck.models.temporary import eval_mode


def register_input_checks(model: PreTrainedModel) -> None:
    """Check all calls of a student's backbone from now on."""
    decoder: Any = model.get_decoder()
    # in some families `decoder` is the head, a linear map
    backbone: Any = decoder if isinstance(decoder, PreTrainedModel) else model.base_model
    modules = list(backbone.modules())
    # the type is checked because blocks of some families have a `mixer` of their own
    converted = [m for m in modules if isinstance(getattr(m, "mixer", None), Mixer)]
    types = tuple({type(m) for m in converted})
    # layers that read the keys of others have none of their own
    sharing = [m for m in modules if getattr(m, "is_kv_shared_layer", False)]
    backbone.limbeck_sites = converted
    backbone.limbeck_softmax = [m for m in modules if type(m) in types and m not in converted and m not in sharing]
    backbone.register_forward_pre_hook(_check_inputs, with_kwargs=True)
    backbone.register_forward_hook(_fill_attention_weights, with_kwargs=True)


def _check_inputs(backbone: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook: refuse unsuitable caches, and return changed arguments for packed documents."""
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():
        raise LimbeckError(
            "torch.jit.trace records the branches that one example takes, and would be wrong for other tokens",
            expected="torch.export.export, with tokens of a fixed shape",
        )
    arguments = bind_arguments(backbone, args, kwargs)
    weights_requested = arguments.get("output_attentions")
    if weights_requested is None:
        weights_requested = getattr(backbone.config, "output_attentions", False)
    output_attentions_requested.set(bool(weights_requested))
    tokens = next((arguments[n] for n in ("input_ids", "inputs_embeds") if arguments.get(n) is not None), None)
    if not isinstance(tokens, Tensor):
        return None
    cache = next((value for value in arguments.values() if isinstance(value, Cache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is not None:
        _check_layers_agree(backbone, cache)
        _check_batch_size(cache, tokens.shape[0])
    changed = _separate_documents(backbone, arguments, cache, tokens.shape[1]) or arguments
    if isinstance(changed.get("logits_to_keep"), int) and changed["logits_to_keep"]:
        # layers that read the keys of others may be skipped for all tokens but the last; a mixer there reads them all
        changed = {**changed, "logits_to_keep": 0}
    return None if changed is arguments else ((), changed)


def _check_layers_agree(backbone: nn.Module, cache: Cache) -> None:
    """Raise LimbeckError if some layers of the cache have read tokens that other layers lack."""
    converted: Any = backbone.limbeck_sites
    indices = [i for i in map(_cache_index, converted) if i is not None]
    layers = [cache.layers[i] for i in indices if i < len(cache.layers)]
    recurrent = [layer for layer in layers if isinstance(layer, RecurrentLayer)]
    if len(recurrent) < len(indices):
        for index in indices:
            if index < len(cache.layers) and not isinstance(cache.layers[index], RecurrentLayer):
                check_layer_is_empty(cache.layers[index], index)
        longest = max((_cached_length(layer) for layer in cache.layers), default=0)
        if longest:
            raise _partly_filled_error(f"{longest} tokens in some layers, and no state in others")
    lengths = {layer.length for layer in recurrent if isinstance(layer.length, int)}
    softmax: Any = backbone.limbeck_softmax
    others = [i for i in map(_cache_index, softmax) if i is not None and i < len(cache.layers)] if lengths else []
    counts = [getattr(cache.layers[index], "get_seq_length", lambda: None)() for index in others]
    lengths.update(count for count in counts if isinstance(count, int))
    if len(lengths) > 1:
        raise _partly_filled_error(" and ".join(f"{n}" for n in sorted(lengths)) + " tokens in different layers")


def _check_batch_size(cache: Cache, batch: int) -> None:
    """Raise LimbeckError if the cache holds another number of sequences than the call."""
    states = (s for layer in cache.layers if isinstance(layer, RecurrentLayer) for s in layer.states if s)
    cached = next((tensor.shape[0] for state in states for tensor in state.values() if tensor.dim()), batch)
    if cached == batch:
        return
    repeatable = batch % cached == 0
    raise LimbeckError(
        f"the cache holds {cached} sequence{'s' * (cached > 1)}, the call has {batch}",
        expected="as many as in the call; num_return_sequences and num_beams multiply the prompts of generate",
        hint=f"cache.batch_repeat_interleave({batch // cached}) first" if repeatable else "use a cache of this batch",
    )


def _separate_documents(backbone: nn.Module, arguments: dict, cache: Cache | None, length: int) -> dict | None:
    """Return the call's arguments changed so that documents in one row are kept apart; None if nothing is to change."""
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    offsets, segments = arguments.get("cu_seq_lens_q"), arguments.get("seq_idx")
    explicit = offsets is not None or segments is not None
    if length == 1 or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
        return None
    if not explicit and (
        positions is None or positions.dim() != 2 or (mask is None and arguments.get("use_cache") is False)
    ):
        return None
    starts = None if positions is None else positions[:, 1:] == 0
    if explicit:
        explicit_starts = _document_starts(offsets, segments, length)
        if starts is None:
            positions = _positions_from_starts(explicit_starts)
        elif not torch.equal(starts.expand_as(explicit_starts), explicit_starts):
            raise LimbeckError(
                "position_ids restart at other tokens than cu_seq_lens_q or seq_idx say",
                expected="positions that count from 0 in each document, or none at all",
            )
        starts = explicit_starts
    assert starts is not None
    if mask is not None:
        valid = mask[:, -length:].bool()
        starts = starts & valid[:, 1:] & valid[:, :-1]
    if not bool(starts.any()):
        return None
    row = "a row of several packed documents (its positions restart at 0)"
    if cache is not None or arguments.get("use_cache"):
        raise LimbeckError(f"{row} cannot fill a cache", expected="no past_key_values, and use_cache=False")
    if mask is not None and not bool(valid.all()):
        raise LimbeckError(f"{row} has padding in its mask", expected="packed rows without attention_mask")
    with eval_mode(backbone):  # without dropout, which would make two equal passes differ
        family_separates = supports_packed_positions(backbone)  # type: ignore[arg-type]
    if not family_separates:
        raise LimbeckError(
            f"{row} would be read as one document: this family does not separate documents by their positions",
            expected="an attention_mask [B, 1, T, T] that allows attention within documents only",
        )
    return {**arguments, "position_ids": positions, "attention_mask": None, "use_cache": False}


def _document_starts(offsets: Tensor | None, segments: Tensor | None, length: int) -> Tensor:
    """Return whether tokens 1 to T - 1 begin a document, bool [B, T - 1], from `cu_seq_lens_q` or `seq_idx`."""
    if segments is not None:
        return segments[:, 1:] != segments[:, :-1]
    assert offsets is not None
    starts = offsets.new_zeros(1, length + 1, dtype=torch.bool).index_fill(1, offsets.long().clamp(max=length), True)
    return starts[:, 1:length]


def _positions_from_starts(starts: Tensor) -> Tensor:
    """Return position ids [B, T] that count from 0 in each document."""
    index = torch.arange(starts.shape[1] + 1, device=starts.device).expand(len(starts), -1)
    begins = torch.cat([torch.zeros_like(index[:, :1]), index[:, 1:] * starts], 1).cummax(1).values
    return index - begins


def _fill_attention_weights(backbone: Any, args: tuple, kwargs: dict, output: Any) -> Any:
    """Forward hook: put None for converted layers among the attention weights, which transformers leaves out."""
    matrices = output.get("attentions") if isinstance(output, ModelOutput) else None
    if matrices is None or torch.compiler.is_compiling():
        return output
    layers = backbone.limbeck_sites[0].mixer.teacher_shape.layers
    converted = {module.mixer.teacher_shape.layer for module in backbone.limbeck_sites}
    if len(matrices) == layers:
        return output
    if len(matrices) != layers - len(converted):
        raise LimbeckError(
            f"the softmax layers of {type(backbone).__name__} returned {len(matrices)} matrices of attention weights, "
            f"expected {layers - len(converted)}",
            expected="a family that returns its attention weights",
            hint="limbeck matrices shows the mixing matrix of any layer",
        )
    weights = iter(matrices)
    output["attentions"] = tuple(None if i in converted else next(weights) for i in range(layers))
    return output


def _cache_index(module: Any) -> int | None:
    """Return the index of a module's layer in the cache, or None if it is not known."""
    # the index seen in an update comes first: a module used at several depths has another `layer_idx`
    seen = getattr(module, "limbeck_layer_idx", None)
    index = getattr(module, "layer_idx", None) if seen is None else seen
    return index if isinstance(index, int) and index >= 0 else None


def _cached_length(layer: Any) -> int:
    if not getattr(layer, "is_initialized", False) or getattr(layer, "keys", None) is None:
        return 0
    return int(layer.get_seq_length())


def _partly_filled_error(detail: str) -> LimbeckError:
    return LimbeckError(
        f"the cache is filled in part: {detail}",
        expected="a new cache, or one that this student filled",
        hint="copy.deepcopy(cache) copies a whole cache; its keys and values alone are not enough",
    )
