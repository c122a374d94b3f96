"""What a student is called with, looked at before its first layer; and what it gives back for attention weights.

    register_input_checks(student)                # once, when the mixers are in: hooks on its body, which every way of calling it runs

A cache that does not hold what the student needs is a LimbeckError: one rebuilt from keys and values, one in which
the softmax layers alone are filled, one with another number of sequences. Documents packed into one row are kept apart
by where their positions begin again (or by `cu_seq_lens_q`, `seq_idx`): transformers looks at positions only where
there is neither cache nor mask, so both are left out then.
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


def register_input_checks(model: PreTrainedModel) -> None:
    """Look at all calls of a student's body from now on."""
    decoder: Any = model.get_decoder()
    # a family whose `decoder` is its head, a linear map, has another name for what runs
    body: Any = decoder if isinstance(decoder, PreTrainedModel) else model.base_model
    modules = list(body.modules())
    # blocks of some families have a `mixer` of their own
    body.limbeck_sites = [m for m in modules if isinstance(getattr(m, "mixer", None), Mixer)]
    kinds = tuple({type(m) for m in body.limbeck_sites})
    # layers that read the keys of others keep none of their own
    shared = [m for m in modules if getattr(m, "is_kv_shared_layer", False)]
    body.limbeck_softmax = [m for m in modules if type(m) in kinds and m not in body.limbeck_sites and m not in shared]
    body.register_forward_pre_hook(_before, with_kwargs=True)
    body.register_forward_hook(_after, with_kwargs=True)


def _before(body: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():
        raise LimbeckError(
            "torch.jit.trace keeps what one example's values and length chose, and would be wrong for other tokens",
            expected="torch.export.export, with tokens of a fixed shape",
        )
    given = bind_arguments(body, args, kwargs)
    wanted = given.get("output_attentions")
    output_attentions_requested.set(
        bool(getattr(body.config, "output_attentions", False) if wanted is None else wanted)
    )
    tokens = next((given[n] for n in ("input_ids", "inputs_embeds") if given.get(n) is not None), None)
    if not isinstance(tokens, Tensor):
        return None
    cache = next((value for value in given.values() if isinstance(value, Cache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is not None:
        _check_filled(body, cache)
        _check_sequences(cache, tokens.shape[0])
    changed = _documents_apart(body, given, cache, tokens.shape[1]) or given
    if isinstance(changed.get("logits_to_keep"), int) and changed["logits_to_keep"]:
        # layers that read the keys of others may be skipped for all tokens but the last; a mixer there reads them all
        changed = {**changed, "logits_to_keep": 0}
    return None if changed is given else ((), changed)


def _check_filled(body: nn.Module, cache: Cache) -> None:
    """Raises LimbeckError where some layers of the cache have read tokens and others that should have did not."""
    sites: Any = body.limbeck_sites
    places = [p for p in map(_place, sites) if p is not None]
    held = [cache.layers[p] for p in places if p < len(cache.layers)]
    ours = [layer for layer in held if isinstance(layer, RecurrentLayer)]
    if len(ours) < len(places):
        for place in places:
            if place < len(cache.layers) and not isinstance(cache.layers[place], RecurrentLayer):
                check_layer_is_empty(cache.layers[place], place)
        read = max((_length(layer) for layer in cache.layers), default=0)
        if read:
            raise _partly(f"{read} tokens in some layers, and no state in others")
    lengths = {layer.length for layer in ours if isinstance(layer.length, int)}
    softmax: Any = body.limbeck_softmax
    beside = [p for p in map(_place, softmax) if p is not None and p < len(cache.layers)] if lengths else []
    counts = [getattr(cache.layers[place], "get_seq_length", lambda: None)() for place in beside]
    lengths.update(count for count in counts if isinstance(count, int))
    if len(lengths) > 1:
        raise _partly(" and ".join(f"{n}" for n in sorted(lengths)) + " tokens in different layers")


def _check_sequences(cache: Cache, count: int) -> None:
    """Raises LimbeckError where the cache holds another number of sequences than the call."""
    states = (s for layer in cache.layers if isinstance(layer, RecurrentLayer) for s in layer.states if s)
    held = next((tensor.shape[0] for state in states for tensor in state.values() if tensor.dim()), count)
    if held == count:
        return
    several = count % held == 0
    raise LimbeckError(
        f"the cache holds {held} sequence{'s' * (held > 1)}, the call has {count}",
        expected="as many as in the call, which generate makes of each prompt by num_return_sequences or num_beams",
        hint=f"cache.batch_repeat_interleave({count // held}) first" if several else "a cache of this batch's own",
    )


def _documents_apart(body: nn.Module, given: dict, cache: Cache | None, length: int) -> dict | None:
    """The call's arguments under which documents in one row are kept apart; None where they are as given."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    ends, numbers = given.get("cu_seq_lens_q"), given.get("seq_idx")
    told = ends is not None or numbers is not None
    if length == 1 or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
        return None
    if not told and (positions is None or positions.dim() != 2 or (mask is None and given.get("use_cache") is False)):
        return None
    starts = None if positions is None else positions[:, 1:] == 0
    if told:
        found = _starts_told(ends, numbers, length)
        if starts is None:
            positions = _positions(found)
        elif not torch.equal(starts.expand_as(found), found):
            raise LimbeckError(
                "position_ids begin again at other tokens than cu_seq_lens_q or seq_idx say",
                expected="positions that count from 0 in each document, or none at all",
            )
        starts = found
    assert starts is not None
    if mask is not None:
        valid = mask[:, -length:].bool()
        starts = starts & valid[:, 1:] & valid[:, :-1]
    if not bool(starts.any()):
        return None
    what = "a row of several packed documents (its positions begin again at 0)"
    if cache is not None or given.get("use_cache"):
        raise LimbeckError(f"{what} is to leave a cache", expected="no past_key_values, and use_cache=False")
    if mask is not None and not bool(valid.all()):
        raise LimbeckError(f"{what} comes with padding in its mask", expected="packed rows without attention_mask")
    if not _keeps_apart(body):
        raise LimbeckError(
            f"{what} would be read as one: this family takes no document ends from positions",
            expected="attention_mask [B, 1, T, T] that is open within documents alone",
        )
    return {**given, "position_ids": positions, "attention_mask": None, "use_cache": False}


def _starts_told(ends: Tensor | None, numbers: Tensor | None, length: int) -> Tensor:
    """Whether tokens 1 to T - 1 begin a document: [B, T - 1]."""
    if numbers is not None:
        return numbers[:, 1:] != numbers[:, :-1]
    assert ends is not None
    starts = ends.new_zeros(1, length + 1, dtype=torch.bool).index_fill(1, ends.long().clamp(max=length), True)
    return starts[:, 1:length]


def _positions(starts: Tensor) -> Tensor:
    """Position ids [B, T] that count from 0 in each document."""
    index = torch.arange(starts.shape[1] + 1, device=starts.device).expand(len(starts), -1)
    begins = torch.cat([torch.zeros_like(index[:, :1]), index[:, 1:] * starts], 1).cummax(1).values
    return index - begins


def _keeps_apart(body: Any) -> bool:
    """`supports_packed_positions`, tried without dropout and without leaving a trace in the modules' modes."""
    modes = [(module, module.training) for module in body.modules()]
    try:
        for module, _ in modes:
            module.training = False
        return supports_packed_positions(body)
    finally:
        for module, training in modes:
            module.training = training


def _after(body: Any, args: tuple, kwargs: dict, output: Any) -> Any:
    """None in the places of converted layers among the attention weights, which transformers leaves out."""
    found = output.get("attentions") if isinstance(output, ModelOutput) else None
    if found is None or torch.compiler.is_compiling():
        return output
    site = body.limbeck_sites[0].mixer.teacher_shape
    converted = {module.mixer.teacher_shape.layer for module in body.limbeck_sites}
    if len(found) == site.layers:
        return output
    if len(found) != site.layers - len(converted):
        raise LimbeckError(
            f"the softmax layers of {type(body).__name__} gave {len(found)} matrices of attention weights, "
            f"expected {site.layers - len(converted)}",
            expected="a family that hands out its attention weights",
            hint="limbeck matrices shows what any layer mixes",
        )
    weights = iter(found)
    output["attentions"] = tuple(None if i in converted else next(weights) for i in range(site.layers))
    return output


def _place(module: Any) -> int | None:
    """Index of a module's layer in the cache, as far as that is known."""
    seen = getattr(module, "limbeck_layer_idx", None)
    place = getattr(module, "layer_idx", None) if seen is None else seen
    return place if isinstance(place, int) and place >= 0 else None


def _length(layer: Any) -> int:
    if not getattr(layer, "is_initialized", False) or getattr(layer, "keys", None) is None:
        return 0
    return int(layer.get_seq_length())


def _partly(what: str) -> LimbeckError:
    return LimbeckError(
        f"the cache is filled in part: {what}",
        expected="a new cache, or one that this student filled",
        hint="copy.deepcopy(cache) keeps all of one; its keys and values alone are not enough",
    )
