"""The source `repeated-text`, as recipes name it: pieces of a text, each twice in a row (`limbeck.data.synthetic`).

    name_repeated_text(data, own)          # "repeated-text" -> "repeated-text:corpus.jsonl", the recipe's own text

A stored recipe always has the complete name, so it says by itself what was read.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # recipes import this module
    from limbeck.core.text_settings import Data

REPEATED_TEXT = "repeated-text"
REPEATED_TEXT_PREFIX = f"{REPEATED_TEXT}:"  # before the name of the text


def has_repeated_text(data: "Data") -> bool:
    """Whether one of the sources is repeated text."""
    return any(one.source.partition(":")[0] == REPEATED_TEXT for one in data.list_sources())


def name_repeated_text(data: "Data", own: "Data") -> "Data":
    """Complete the source `repeated-text` of `data`, alone or one of several, with the first text of the recipe's own.

    It is opened as that text is, and holds out the same documents.

    Raises:
        ValueError: the recipe's own data has no text.
    """
    if REPEATED_TEXT not in [one.source for one in data.list_sources()]:
        return data
    text = next((one for one in own.list_sources() if one.source not in (REPEATED_TEXT, "repeats")), None)
    if text is None:
        raise ValueError(f"{REPEATED_TEXT} needs a text: {REPEATED_TEXT_PREFIX}SOURCE")
    named = text.model_copy(update={"source": f"{REPEATED_TEXT_PREFIX}{text.source}"})
    shared = {key: getattr(own, key) for key in ("held_out", "max_tokens") if key not in data.model_fields_set}
    if data.sources is None:
        return data.model_copy(update={**shared, **named.model_dump(exclude={"weight"})})
    sources = [
        named.model_copy(update={"weight": one.weight}) if one.source == REPEATED_TEXT else one for one in data.sources
    ]
    return type(data).model_validate({**data.model_dump(exclude={"source"}), **shared, "sources": sources})
