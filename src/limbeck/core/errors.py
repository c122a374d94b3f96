"""The one exception that users are meant to read, and helpers to word it.

    raise LimbeckError("unknown mixer 'gatd_deltanet'", expected="one of: gla, ...", hint="limbeck students")

The command line prints it without a traceback and exits with code 2; in Python it is an ordinary exception, of which a
notebook shows the message alone.
"""

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# what other trainers call a key, and too far from its name here to be found as a typing error
OTHER_NAMES = {
    "learning_rate": "lr",
    "max_length": "seq_len",
    "max_seq_length": "seq_len",
    "sequence_length": "seq_len",
    "block_size": "seq_len",
    "max_steps": "tokens",
    "num_train_epochs": "tokens",
    "gradient_accumulation_steps": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_checkpointing": "checkpoint_activations",
    "bf16": "precision",
    "fp16": "precision",
    "output_dir": "out",
    "max_new_tokens": "new_tokens",
}


class LimbeckError(Exception):
    """Report a mistake of the user: what is wrong, what was expected, what to do next.

    Args:
        found: what is wrong, in one sentence.
        expected: what would have been right.
        hint: the next command to type or setting to change.
    """

    exit_code = 2

    def __init__(self, found: str, *, expected: str | None = None, hint: str | None = None):
        self.found, self.expected, self.hint = found, expected, hint
        lines = [found]
        if expected:
            lines.append(f"expected: {expected}")
        if hint:
            lines.append(f"try: {hint}")
        super().__init__("\n".join(lines))

    def _render_traceback_(self) -> list[str]:
        """Return what Jupyter shows in the place of a traceback: the message, for the mistake is in the user's cell."""
        return f"{type(self).__name__}: {self}".splitlines()


@contextmanager
def rewrite_hints(names: dict[str, str]) -> Iterator[None]:
    """Replace recipe keys in the hints of errors raised inside: {"data.text_field": "data.sources.1.text_field"}."""
    try:
        yield
    except LimbeckError as error:
        hint = error.hint or ""
        for old, new in names.items():
            hint = hint.replace(old, new)
        if hint == (error.hint or ""):
            raise
        raise LimbeckError(error.found, expected=error.expected, hint=hint) from error


def suggest_closest(name: str, choices: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the choice closest to `name`, or an empty string if none is close.

    Case does not count, and what other trainers call the same thing is known.
    """
    by_lower = {choice.lower(): choice for choice in choices}
    ours = OTHER_NAMES.get(name.lower())
    closest = [ours] if ours in by_lower else difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f", did you mean '{by_lower[closest[0]]}'?" if closest else ""


def suggest_hub_name(address: str) -> str | None:
    """Return the owner/name of a model or dataset whose page on the hub has this address; None for any other text."""
    page = re.fullmatch(
        r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)(/.*)?", address
    )
    return page[1] if page else None


def summarize_error(error: BaseException, max_sentences: int = 2) -> str:
    """Return the first sentences of another library's error on one line, or its type if it has no message."""
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    # Sentences, not lines: a first line often ends in a colon, or in the middle of the sentence that names the cause.
    return " ".join(re.split(r"(?<=[.!?])\s+(?=[A-Z`'\"(])", text)[:max_sentences])


def format_python_command(code: str) -> str:
    """Return a shell command that runs `code`, for hints."""
    return f"python -c {shlex.quote(code)}" if any(c in code for c in '"$`\\') else f'python -c "{code}"'
