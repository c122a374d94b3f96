"""Changes to somebody's model for the time of a pass, put back afterwards exactly as they were.

    with use_attn_implementation(model, "eager"), eval_mode(model):
        model.get_decoder()(...)

A model may be shared by threads: passes that need it in different states wait for each other (`exclusive_access`).
Attributes of instances are restored, not deleted, because others may have set them: accelerate's hooks and
torch.compile both live in a module's `forward` attribute.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

# weak keys instead of an attribute of the model: a copy of a model must not share its lock
_locks: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


@contextmanager
def exclusive_access(module: nn.Module) -> Iterator[None]:
    """Let one thread at a time inside, for each module; the same thread may enter again."""
    with _locks_guard:
        lock = _locks.setdefault(module, threading.RLock())
    with lock:
        yield


@contextmanager
def instance_attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module's instance, past nn.Module's own registration; afterwards it is as it was."""
    was_set, before = name in module.__dict__, module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if was_set:
            module.__dict__[name] = before
        else:
            del module.__dict__[name]


@contextmanager
def use_attn_implementation(module: nn.Module, name: str) -> Iterator[None]:
    """Set the attention implementation in the module's config and the configs inside it; afterwards each as it was."""
    config: Any = module.config
    with exclusive_access(module):
        before = [(part, part._attn_implementation) for part in iterate_configs(config)]
        try:
            config._attn_implementation = name
            yield
        finally:
            for part, implementation in before:
                part._attn_implementation_internal = implementation


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode; afterwards every module is in the mode in which it was."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode and stop gradients; afterwards every module and parameter is as it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with eval_mode(model):
            model.requires_grad_(False)
            yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad = requires_grad


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and advice of transformers, which would mix with our own; afterwards they are as before."""
    level, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bars:
            transformers_logging.enable_progress_bar()


def iterate_configs(config: PreTrainedConfig) -> Iterator[Any]:
    """Yield a config and, recursively, the configs inside it (text, vision, ...)."""
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield from iterate_configs(inner)
