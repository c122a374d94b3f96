"""Checks on students: tiny models of every family with the mixer in place of their attention.

steps(Variant("gla"), "llama")
"""

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from limbeck.contract.families import COUNTS_FROM_MASK, tiny
from limbeck.contract.registry import check
from limbeck.contract.variant import LENGTH, Variant, ids_of, left_padded, same
from limbeck.data.packing import Batch
from limbeck.model import mixers_of, with_cache
from limbeck.model.body import run_body


@check("prefill in two pieces, then token by token, gives the logits of one pass")
@torch.no_grad()
def steps(variant: Variant, family: str) -> None:
    student, ids = variant.student(family), ids_of()
    full = student(ids).logits
    cache = DynamicCache(config=student.config)
    ends = [20, 29, *range(30, LENGTH + 1)]
    for begin, end in zip([0, *ends[:-1]], ends):
        part = student(ids[:, begin:end], **with_cache(student, cache)).logits
        same(part, full[:, begin:end], f"logits of tokens {begin} to {end}, with the cache of those before")
    changed = ids.clone()
    changed[:, 0] = 5
    apart = (student(changed).logits[:, -1] - full[:, -1]).abs().max()
    assert apart > 1e-6, "the first token makes no difference to the last one's logits"


@check("a left-padded row gives the logits that it gives alone")
@torch.no_grad()
def padding(variant: Variant, family: str) -> None:
    student, ids = variant.student(family), ids_of()
    logits = student(**left_padded(ids, 5, family)).logits
    same(logits[0, 5:], student(ids[:1, :-5]).logits[0], "logits of the row with 5 tokens of padding")
    same(logits[1], student(ids[1:]).logits[0], "logits of the row beside it")


@check("left-padded generation, greedy and with 3 beams, says what it says unpadded", slow=True)
@torch.no_grad()
def generation(variant: Variant, family: str) -> None:
    student, ids = variant.student(family), ids_of(length=20)
    inputs = left_padded(ids, 5)
    del inputs["position_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 3):
        both = student.generate(**inputs, num_beams=beams, **settings)
        for row, begin in ((ids[:1, :15], 5), (ids[1:], 0)):
            alone = student.generate(row, num_beams=beams, **settings)[0]
            got = both[0 if begin else 1, begin:]
            assert torch.equal(got, alone), f"{beams} beams: {got[-6:].tolist()} padded, {alone[-6:].tolist()} alone"


@check("documents packed into one row give what they give apart")
@torch.no_grad()
def packing(variant: Variant, family: str) -> None:
    student, ids = variant.student(family), ids_of()
    positions = torch.cat([torch.arange(13), torch.arange(LENGTH - 13)])[None].expand(2, -1)
    packed = run_body(student, Batch(ids, positions, ids))
    for part in (slice(0, 13), slice(13, LENGTH)):
        alone = student.base_model(ids[:, part], use_cache=False).last_hidden_state
        same(packed[:, part], alone, f"hidden states of the document at tokens {part.start} to {part.stop}")


@check("the mixing matrix is lower triangular and times v it is the output")
@torch.no_grad()
def matrix_in_student(variant: Variant, family: str) -> None:
    student, ids = variant.student(family), ids_of()
    sites, caught = list(mixers_of(student)), {}
    for name in sites:

        def catch(module, args, kwargs, output, name=name):
            caught[name] = (args, kwargs, output)

        student.get_submodule(name).register_forward_hook(catch, with_kwargs=True)
    padded = family not in COUNTS_FROM_MASK
    student(**(left_padded(ids, 4, family) if padded else {"input_ids": ids}), use_cache=False)
    for name in sites:
        args, kwargs, out = caught.pop(name)
        again, matrix = student.get_submodule(name)(*args, **kwargs, output_matrix=True)
        heads = mixers_of(student)[name].site.heads
        assert matrix.shape == (2, heads, LENGTH, LENGTH), f"{name}: matrix of shape {list(matrix.shape)}"
        assert torch.equal(matrix, matrix.tril()), f"{name}: the matrix looks ahead"
        valid = slice(4 if padded else 0, None)
        same(again[:, valid], out[0][:, valid], f"{name}: matrix times v beside the output")


@check("gradients reach every parameter of the student, and none of the mixer's is zero")
def gradients(variant: Variant, family: str) -> None:
    student, ids = variant.student(family).train(), ids_of(length=80)  # what looks behind a window of 64 learns too
    student(ids, labels=ids).loss.backward()
    none = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not none, f"no finite gradient: {', '.join(none)}"
    zero = [
        f"{site}.{n}"
        for site, module in mixers_of(student).items()
        for n, p in module.named_parameters()
        if not p.grad.abs().sum() > 0
    ]
    assert not zero, f"gradient is zero: {', '.join(zero)}"


@check("saving and reloading gives every tensor back bit for bit, twice", slow=True)
@torch.no_grad()
def saving(variant: Variant, family: str) -> None:
    student, ids = variant.student(family, torch.float32, moved=0.05), ids_of(1, 9)
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        loaded, info = cast(Any, AutoModelForCausalLM).from_pretrained(folder, output_loading_info=True)
        again = Path(folder) / "again"
        loaded.save_pretrained(again)
        twice = AutoModelForCausalLM.from_pretrained(again)
    assert not info["missing_keys"], f"not saved: {', '.join(info['missing_keys'])}"
    assert not info["unexpected_keys"], f"saved but not known: {', '.join(info['unexpected_keys'])}"
    assert type(loaded).__mro__[2] is type(tiny(family)), f"loaded as {type(loaded).__mro__}"
    before = student.state_dict()
    for model in (loaded, twice):
        after = model.state_dict()
        assert before.keys() == after.keys()
        other = [name for name in before if not torch.equal(before[name], after[name])]
        assert not other, f"came back changed: {', '.join(other)}"
        assert torch.equal(student(ids).logits, model(ids).logits), "the reloaded student gives other logits"


@check("a student in bfloat16, and one under autocast, stays close to float32")
@torch.no_grad()
def half_precision(variant: Variant) -> None:
    student, ids = variant.student("llama", torch.float32, moved=0.0), ids_of()
    exact = student(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = student(ids).logits
    half = student.to(torch.bfloat16)(ids).logits  # type: ignore[arg-type]
    for name, logits in (("autocast", mixed), ("bfloat16", half)):
        assert logits.isfinite().all(), f"{name}: not finite"
        error = float((logits - exact).norm() / exact.norm())
        assert error < 0.1, f"{name}: logits are off by {100 * error:.0f} % (at most 10 %)"
