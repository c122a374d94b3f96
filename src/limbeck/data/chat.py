"""Conversations: rendered by the tokenizer's chat template, only the assistant's answers are learnt.

    encoder = ChatEncoder(tokenizer, eos=2)
    ids, mask = encoder.encode([json.dumps([{"role": "user", "content": "Hi"}, ...]).encode()])[0]

A template with `{% generation %}` marks the answers itself. For any other they are found by rendering the
conversation up to each answer and up to its end: both must be beginnings of the whole, as text and as tokens. A
conversation for which they are not (a template that rewrites earlier messages, a token across the border) is dropped,
counted and reported.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from limbeck.console import console
from limbeck.data import sources
from limbeck.data.encode import Encoded, plain_ids
from limbeck.data.hub import Rows
from limbeck.data.sources import MESSAGES
from limbeck.errors import LimbeckError

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
NOTHING: Encoded = (np.empty(0, np.int64), np.empty(0, np.uint8))


class ChatEncoder:
    """Conversations as tokens, with a mask of the answers.

    Args:
        tokenizer: with a chat template.
        eos: token that ends a document; put there if the template ends the last answer with no such token.
        field: of the messages.

    Raises:
        LimbeckError: the tokenizer has no chat template.
    """

    masked = True

    def __init__(self, tokenizer: Any, eos: int, field: str = MESSAGES):
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise LimbeckError(
                "the records are conversations, and the tokenizer has no chat template",
                expected="a teacher whose tokenizer has one (an 'instruct' or 'chat' model)",
                hint="data.chat: false and data.text_field to train on a field of plain text",
            )
        self.tokenizer, self.eos, self.field = tokenizer, eos, field
        self.marked = isinstance(template, str) and bool(MARKED.search(template))
        self.settings = {"chat": hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()}
        self.seen, self.dropped, self.why = 0, 0, ""

    @property
    def highest(self) -> int:
        """Largest id that can come."""
        return max(self.eos, *self.tokenizer.get_vocab().values())

    def read(self, source: str | Rows, *, part: bool = False) -> Iterator[bytes]:
        """The conversations as JSON."""
        for text in sources.documents(source, text_field=self.field, chat=True, part=part):
            yield text.encode("utf-8", "replace")

    def encode(self, documents: list[bytes]) -> list[Encoded]:
        """Ids and mask of each conversation; nothing where it is dropped."""
        found = [
            self._marked(json.loads(raw)) if self.marked else self._by_prefix(json.loads(raw)) for raw in documents
        ]
        self.seen += len(found)
        return found

    def report(self, source: str) -> None:
        """Says how many conversations were dropped; raises where none is left."""
        if self.dropped:
            found = f"{self.dropped:,} of {self.seen:,} conversations of '{source}' were dropped: {self.why}"
            if self.dropped == self.seen:
                raise LimbeckError(found, expected="conversations that the tokenizer's chat template can render")
            console.print(found, markup=False)
        self.seen = self.dropped = 0

    def _drop(self, why: object) -> Encoded:
        self.dropped += 1
        self.why = self.why or " ".join(str(why).split())[:200]
        return NOTHING

    def _marked(self, messages: list[dict[str, Any]]) -> Encoded:
        try:
            made = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:  # templates raise what they like: roles that do not alternate, unknown fields
            return self._drop(error)
        ids, mask = np.array(made["input_ids"], np.int64), np.array(made["assistant_masks"], np.uint8)
        return self._ended(ids, mask) if mask.any() else self._drop("no answer of the assistant in it")

    def _by_prefix(self, messages: list[dict[str, Any]]) -> Encoded:
        def render(part: list[dict[str, Any]], ask: bool = False) -> str:
            return self.tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=ask)

        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return self._drop("no answer of the assistant in it")
        try:
            texts = [render(messages)]
            for i in answers:
                texts += [render(messages[:i], ask=True) if i else "", render(messages[: i + 1])]
        except Exception as error:
            return self._drop(error)
        if not all(texts[0].startswith(text) for text in texts):
            return self._drop("the template renders the beginning of a conversation otherwise than the whole")
        whole, *prefixes = plain_ids(self.tokenizer, texts)
        if not all(whole[: len(ids)] == ids for ids in prefixes):
            return self._drop("a token reaches across the border of an answer")
        mask = np.zeros(len(whole), np.uint8)
        for before, upto in zip(prefixes[::2], prefixes[1::2]):
            begin, end = len(before), len(upto)
            answer = whole[begin:end]
            if self.eos in answer:  # what the template puts after the end of an answer is not the assistant's
                end -= answer[::-1].index(self.eos)
            mask[begin:end] = 1
        if not mask.any():
            return self._drop("its answers are empty")
        return self._ended(np.array(whole, np.int64), mask)

    def _ended(self, ids: np.ndarray, mask: np.ndarray) -> Encoded:
        last = int(np.flatnonzero(mask)[-1])
        if self.eos in ids[last:].tolist():
            return ids, mask
        return np.append(ids, self.eos), np.append(mask, np.uint8(last == len(ids) - 1))
