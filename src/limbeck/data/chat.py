"""Conversations as tokens: rendered by the tokenizer's chat template, with the assistant's answers as targets.

    encoder = ChatEncoder(tokenizer, eos=2)
    ids, mask = encoder.encode([json.dumps([{"role": "user", "content": "Hi"}, ...]).encode()])[0]

`limbeck.data.chat_template` renders a conversation and locates its answers. What is in a message is text: control
tokens in it are split. A conversation that cannot be rendered faithfully is dropped, counted and reported.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.data.chat_template import NO_ANSWER, ChatTemplate, ConversationError, RenderedText, Span
from limbeck.data.documents import iter_documents
from limbeck.data.hub import LoadedDataset
from limbeck.data.records import MESSAGES_FIELD
from limbeck.data.special_tokens import (
    Encoded,
    find_special_token_ids,
    get_control_token_ids,
    prepend_prefix,
    run_tokenizer,
    tokenize_inner_piece,
)

DROPPED: Encoded = (np.empty(0, np.int64), np.empty(0, np.uint8))


class ChatEncoder:
    """Conversations as tokens, with a mask of the answers.

    Args:
        tokenizer: with a chat template.
        eos: token that ends a document; appended if the template ends the last answer with no such token.
        field: of the messages.

    Raises:
        LimbeckError: the tokenizer has no chat template.
    """

    has_mask = True

    def __init__(self, tokenizer: Any, eos: int, field: str = MESSAGES_FIELD):
        if not getattr(tokenizer, "chat_template", None):
            raise LimbeckError(
                "the records are conversations, and the tokenizer has no chat template",
                expected="a teacher whose tokenizer has one (an 'instruct' or 'chat' model)",
                hint="data.chat: false and data.text_field to train on a field of plain text",
            )
        self.tokenizer, self.eos, self.field = tokenizer, eos, field
        self.template = ChatTemplate(tokenizer)
        self.prefix_ids = find_special_token_ids(tokenizer).prefix_ids
        # Some tokenizers leave BOS to their template.
        template_has_bos = "bos_token" in json.dumps(tokenizer.chat_template)
        if not self.prefix_ids and tokenizer.bos_token_id is not None and template_has_bos:
            self.prefix_ids = (tokenizer.bos_token_id,)
        self._stop_ids = get_control_token_ids(tokenizer) | {eos}
        tokens = tokenizer.convert_ids_to_tokens(sorted(self._stop_ids))
        encoded = run_tokenizer(tokenizer, tokens, split_special_tokens=True)["input_ids"]
        # Unigram vocabularies find a control token in plain text, unless it comes in two pieces.
        self._breaks_control_tokens = not self._stop_ids.isdisjoint(i for ids in encoded for i in ids)
        source = json.dumps(self.template.source, sort_keys=True)
        self.settings = {"chat": hashlib.sha256(source.encode()).hexdigest()}
        self._reset_counts()

    def _reset_counts(self) -> None:
        self._conversations = 0
        self.dropped: Counter[str] = Counter()
        self.template.unseen.clear()

    @property
    def max_token_id(self) -> int:
        """Largest id that can come."""
        return max(self.eos, *self.tokenizer.get_vocab().values())

    def read(self, source: str | LoadedDataset, *, allow_empty: bool = False) -> Iterator[bytes]:
        """Yield the conversations as JSON."""
        for text in iter_documents(source, text_field=self.field, chat=True, allow_empty=allow_empty):
            yield text.encode("utf-8", "replace")

    def encode(self, documents: list[bytes]) -> list[Encoded]:
        """Return ids and mask of each conversation; nothing where it is dropped."""
        encoded = []
        for raw in documents:
            self._conversations += 1
            try:
                encoded.append(self._tokenize(*self.template.render(json.loads(raw))))
            except ConversationError as reason:
                self.dropped[str(reason)] += 1
                encoded.append(DROPPED)
        return encoded

    def find_cut(self, document: bytes, near: int) -> None:
        """A conversation stays whole."""

    def report(self, source: str) -> None:
        """Print how many conversations were dropped, and why; LimbeckError where none is left."""
        dropped, total = sum(self.dropped.values()), self._conversations
        if dropped:
            reasons = [f"{reason} ({n:,})" if n < dropped else reason for reason, n in self.dropped.most_common(4)]
            reasons += [f"{len(self.dropped) - 4} other reasons"] if len(self.dropped) > 4 else []
            message = f"{dropped:,} of {total:,} conversations of '{source}' were dropped: {'; '.join(reasons)}"
            if dropped == total:
                raise LimbeckError(message, expected="conversations that the tokenizer's chat template can render")
            console.print(message, markup=False)
        for what, n in self.template.unseen.items():
            console.print(
                f"{n:,} of {total:,} conversations of '{source}' have {what} that the chat template does not show: "
                "trained without",
                markup=False,
            )
        self._reset_counts()

    def _tokenize(self, rendered: RenderedText, answers: list[Span]) -> Encoded:
        """Return the ids of a text behind the tokenizer's prefix, with 1 for what belongs to an answer."""
        text = rendered.text
        has_offsets = bool(getattr(self.tokenizer, "is_fast", False))
        # Without offsets, tokens end where answers do.
        borders = rendered.control if has_offsets else [*rendered.control, *answers]
        if self._breaks_control_tokens:
            borders = [*borders, *((begin, begin + 1) for begin, _ in rendered.control)]
        plain = {begin + more for begin, _ in rendered.control for more in (0, 1)}
        ids: list[int] = []
        spans: list[Span] = []  # of each token in the text
        for begin, end in pairwise(sorted({0, len(text), *(at for border in borders for at in border)})):
            settings = {"split_special_tokens": begin in plain}
            settings |= {"return_offsets_mapping": True} if has_offsets else {}
            output, skip = tokenize_inner_piece(self.tokenizer, text[begin:end], first=begin == 0, **settings)
            ids += output["input_ids"][skip:]
            shift = begin - bool(skip)  # offsets count from the newline that was put before the piece
            if has_offsets:
                offsets = output["offset_mapping"][skip:]
            else:
                offsets = [(0, end - begin)] * (len(ids) - len(spans))
            spans += [(a + shift, b + shift) for a, b in offsets]
        mask = self._mask_answers(text, ids, spans, answers)
        if not mask.any():
            raise ConversationError("its answers are empty" if answers else NO_ANSWER)
        whole = np.array(prepend_prefix(ids, self.prefix_ids), np.int64)
        mask = np.concatenate([np.zeros(len(whole) - len(ids), np.uint8), mask])
        last = int(np.flatnonzero(mask)[-1])
        if self.eos in whole[last:].tolist():
            return whole, mask
        return np.append(whole, self.eos), np.append(mask, np.uint8(last == len(whole) - 1))

    def _mask_answers(self, text: str, ids: list[int], spans: list[Span], answers: list[Span]) -> np.ndarray:
        mask = np.zeros(len(ids), np.uint8)
        begins, ends = (np.array([span[side] for span in spans], np.int64) for side in (0, 1))
        for begin, end in answers:
            inside = np.flatnonzero((begins < end) & (ends > begin) & (ends > begins))
            mask[inside] = 1
            # What the template puts behind the end of an answer is not the assistant's.
            stop = next((i for i in inside[::-1] if ids[i] in self._stop_ids), None)
            if stop is not None and not text[spans[stop][1] : end].strip():
                mask[inside[inside > stop]] = 0
        return mask
