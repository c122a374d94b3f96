"""Settings of the text: where it comes from, and how it is cut into sequences. A recipe has them once or more often.

    text = Data(source="corpus.jsonl", seq_len=1024)
    [source.source for source in text.list_sources()]      # ["corpus.jsonl"]

Of a mixture, `sources` has one entry for each text.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from limbeck.core.config import Part
from limbeck.core.counts import parse_count
from limbeck.core.errors import LimbeckError
from limbeck.core.old_keys import OLD_KEYS
from limbeck.core.repeated_text import has_repeated_text


def _read_count(value: Any) -> Any:
    """Read a count of tokens as people write it, 20M; leave any other text to be refused with its key's name."""
    try:
        return parse_count(value)
    except LimbeckError:
        return value


Count = Annotated[int, BeforeValidator(_read_count)]


class Source(Part):
    """One of several sources of text."""

    source: str
    """As `data.source`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share of the sequences is this weight / the sum of all weights."""
    text_field: str = "text"
    """The field of a record that holds the text; `outer.inner` for a field in another."""
    chat: bool | None = None
    """Whether records are conversations; null: detected by a field `messages`."""


class Data(Part):
    """The text: where it comes from and how it is cut into sequences (docs/guides/data.md)."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["data"]
    source: str = "embedded"
    """A file, a folder, a dataset of the Hub (`owner/name`), or `embedded`: the text that comes with Limbeck."""
    sources: Annotated[list[Source], Field(min_length=1)] | None = None
    """Instead of `source`: several, by weight."""
    text_field: str = "text"
    """The field of a record that holds the text; `outer.inner` for a field in another."""
    chat: bool | None = None
    """Records are conversations and only answers are targets; null: detected by a field `messages`."""
    seq_len: Annotated[Count, Field(ge=16)] = 512
    """Tokens in a sequence."""
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Share of the documents reserved for evaluation."""
    max_tokens: Annotated[Count, Field(gt=0)] | None = None
    """Tokenize at most so many tokens of each source; null: all."""
    documents: Literal["packed", "shuffled", "whole"] = "packed"
    """`packed`: documents fill the sequences one after the other, a long one many in a row; `shuffled`: these sequences
    in random order; `whole`: each sequence is the beginning of one document of at least `seq_len` tokens.
    """
    streaming: bool = False
    """Tokenize shard by shard during training, not everything first."""
    cache_gb: Annotated[float, Field(gt=0)] = 20.0
    """With streaming: disk space for tokens, in GB."""

    @model_validator(mode="after")
    def _check_sources(self) -> "Data":
        if self.streaming and self.max_tokens is not None:
            raise ValueError("max_tokens limits text that is tokenized in advance; with streaming leave it out (null)")
        if self.streaming and (has_repeated_text(self) or self.documents != "packed"):
            raise ValueError(
                "repeated-text and documents: whole or shuffled choose among all documents, so without streaming"
            )
        if self.sources is not None:
            names = " + ".join(f"{one.weight:g} {one.source}" for one in self.sources)
            if "source" in self.model_fields_set and self.source != names:
                raise ValueError("source and sources exclude each other; set one of them")
            for name in ("text_field", "chat"):
                if getattr(self, name) != Data.model_fields[name].default:
                    raise ValueError(f"with several sources, {name} has to be set for each source")
            object.__setattr__(self, "source", names)  # for messages and for the stored recipe
        return self

    def list_sources(self) -> list[Source]:
        """List the sources: those of a mixture, or the only one."""
        return self.sources or [Source(source=self.source, text_field=self.text_field, chat=self.chat)]
