"""What is changed on somebody's model for the time of a pass, and put back as it was: attention function, eval mode.

    with implemented_by(model, "eager"):
        model.get_decoder()(...)

A model may be shared by threads. Passes that need it in different states wait for each other.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

_locks: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()  # a lock on the model is no copy's
_first = threading.Lock()


@contextmanager
def alone_with(module: nn.Module) -> Iterator[None]:
    """No other thread inside, for the same module; the same thread may come again."""
    with _first:
        lock = _locks.setdefault(module, threading.RLock())
    with lock:
        yield


@contextmanager
def implemented_by(module: nn.Module, name: str) -> Iterator[None]:
    """That attention implementation in the module's config and those inside it; afterwards each as it was."""
    config: Any = module.config
    with alone_with(module):
        before = [(one, one._attn_implementation) for one in _configs(config)]
        try:
            config._attn_implementation = name
            yield
        finally:
            for one, was in before:
                one._attn_implementation_internal = was


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


def _configs(config: PreTrainedConfig) -> Iterator[Any]:
    """A config and the configs inside it."""
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield from _configs(inner)
