"""What a written export is worth in its engine: the same numbers, perplexity, speed, each beside the student's own.

    text = load_text(tokenizer, tokens=2048)                            # documents that nobody trained on
    measurer = ExportMeasurer(exporter, student, tokenizer, text)
    record = measurer.measure(folder, record)                           # verified, scored, timed, and kept
    measurer.continuation                                               # what the engine said

Several files of one student share a measurer: the student's own part is computed once.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError
from limbeck.data.special_tokens import encode_prompt
from limbeck.evaluation.exam import HELD_OUT_TEXT, load_exam_documents
from limbeck.models.conversation import StudentEngine, continue_greedily, list_end_tokens
from limbeck.models.export import Exporter
from limbeck.models.export.record import ExportRecord, Rates, TextScore, save_record
from limbeck.models.export.verification import sum_model_losses

TOKENS = 2048
LENGTH = 512  # tokens of a document; each is read alone
PROMPT = "Once upon a time"
NEW_TOKENS = 32


@dataclass(frozen=True)
class ExportText:
    """Documents as tokens, to be read one by one from an empty state."""

    source: str
    sequences: list[list[int]]

    @property
    def targets(self) -> int:
        """Tokens that are predicted: all but each first one."""
        return sum(len(ids) - 1 for ids in self.sequences)


def load_text(tokenizer: Any, tokens: int = TOKENS, source: str = HELD_OUT_TEXT) -> ExportText:
    """Load about `tokens` tokens: the beginnings of the longest documents of a source, of up to `LENGTH` tokens each.

    Raises:
        LimbeckError: fewer than two tokens, or as `limbeck.evaluation.exam.load_exam_documents`.
    """
    if tokens < 2:
        raise LimbeckError(f"--tokens {tokens}", expected="2 or more, or 0 for no perplexity")
    length = min(tokens, LENGTH)
    documents = load_exam_documents(source, tokenizer, max(1, tokens // length), length)
    return ExportText(source, [ids.tolist() for ids in documents.tokens])


class ExportMeasurer:
    """Measures written exports of one student.

    Args:
        text: None: no perplexity.

    Attributes:
        continuation: of `PROMPT`, by the engine that measured last; None for a format that is not made to speak.
    """

    def __init__(self, exporter: Exporter, student: Any, tokenizer: Any, text: ExportText | None):
        self.exporter, self.student, self.tokenizer, self.text = exporter, student, tokenizer, text
        self.continuation: str | None = None

    def measure(self, folder: Path, record: ExportRecord) -> ExportRecord:
        """Verify, score and time an export; returns its record with the results, which is kept beside the files.

        Raises:
            EngineMissingError: its engine is not installed.
        """
        record = replace(record, verification=self.exporter.verify(self.student, self.tokenizer, folder))
        save_record(folder, record)  # what is known stays known if the rest is interrupted
        if self.text is not None:
            record = replace(record, score=self._score(folder, self.text))
        if self.exporter.speak is not None:
            record = replace(record, rates=self._speak(folder))
        save_record(folder, record)
        return record

    def _score(self, folder: Path, text: ExportText) -> TextScore:
        loss = self.exporter.score(folder, text.sequences) / text.targets
        return TextScore(text.source, text.targets, math.exp(min(loss, 700.0)), self._student_perplexity)

    def _speak(self, folder: Path) -> Rates:
        assert self.exporter.speak is not None
        speech = self.exporter.speak(folder, self._prompt, NEW_TOKENS)
        ends = {self.tokenizer.eos_token_id, *list_end_tokens(self.student)}
        count = next((i for i, token in enumerate(speech.token_ids) if token in ends), NEW_TOKENS)
        self.continuation = self.tokenizer.decode(speech.token_ids[:count], skip_special_tokens=True)
        return Rates(speech.tokens_per_second, self._student_rate, speech.threads)

    @cached_property
    def _prompt(self) -> list[int]:
        return encode_prompt(self.tokenizer, PROMPT)

    @cached_property
    def _student_perplexity(self) -> float:
        assert self.text is not None
        return math.exp(min(sum_model_losses(self.student, self.text.sequences) / self.text.targets, 700.0))

    @cached_property
    def _student_rate(self) -> float:
        return continue_greedily(StudentEngine(self.student), self._prompt, NEW_TOKENS)[1]
