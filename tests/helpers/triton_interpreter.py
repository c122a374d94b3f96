"""Triton kernels on a CPU, in Triton's interpreter, each beside the operator in torch: prints a verdict as JSON a line.

    TRITON_INTERPRET=1 python tests/triton_interpreter.py scalar_decay gated_delta_rule

In a process of its own (test_triton.py starts it): Triton reads the variable when it is imported, for good. Some things
that the interpreter cannot do are helped out here, none of which changes what a kernel computes: it has nothing to time
block sizes with (the first one is taken), loop counters are Python's ints (they get `.to`), masks may come as integers,
and a name that a module took from triton.language at its import is looked up again.
"""

import json
import sys

import triton.language as tl
from triton.runtime import autotuner, interpreter


class Counter(int):
    """A loop counter with what kernels ask of a scalar."""

    def to(self, dtype: object) -> "Counter":
        return self


def counted(*ends: object) -> list[Counter]:
    return [Counter(n) for n in range(*(int(end) for end in ends))]


def first_configuration(self, fn, names, configs, *rest, **options):
    _autotuner(self, fn, names, configs[:1], *rest, **options)


def compiled(self, tree):
    names = self.fn.__globals__
    names["range"] = counted
    if "gather" in names:
        names["gather"] = lambda source, index, axis: tl.gather(source, index, axis)
    return _compiled(self, tree)


def boolean(method, place):
    """With the argument at that place, a mask, made of truth values."""

    def run(self, *given):
        mask = given[place]
        if mask is not None:
            mask = interpreter.TensorHandle(mask.data.astype(bool), tl.int1)
        return method(self, *given[:place], mask, *given[place + 1 :])

    return run


_autotuner, autotuner.Autotuner.__init__ = autotuner.Autotuner.__init__, first_configuration
_compiled, interpreter.FunctionRewriter._compile_and_exec = interpreter.FunctionRewriter._compile_and_exec, compiled
for _name, _place in (("create_masked_load", 1), ("create_masked_store", 2)):
    setattr(interpreter.InterpreterBuilder, _name, boolean(getattr(interpreter.InterpreterBuilder, _name), _place))


def main(names: list[str]) -> None:
    import torch

    from limbeck import ops  # noqa: F401  (operators register themselves)
    from limbeck.ops import fla
    from limbeck.ops.fla.verify import verify_kernel

    for adapter in (a for a in fla.KERNEL_ADAPTERS if a.name in names):
        exact = adapter.allows_tf32 or torch.float32 in adapter.dtypes
        sizes = {"time": 1 if adapter.form == "recurrent" else 40, "heads": 2, "key": 16, "value": 16}
        if adapter.name == "scalar_decay":
            sizes["value"] = 17  # with a normaliser
        for state, documents in ((False, 1), (True, 1), (True, 2)):
            if documents > 1 and not adapter.supports_varlen:
                continue
            given = {"state": state, "documents": documents, "dtype": torch.float32 if exact else torch.float16}
            verdict = verify_kernel(adapter, fla.make_sample_call(adapter, slots=16, device="cpu", **sizes, **given))
            line = {"name": adapter.name, "state": state, "documents": documents, "ok": verdict.ok}
            print(json.dumps({**line, "reason": verdict.reason, "errors": verdict.errors}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
