"""A loaded model as lm-evaluation-harness wants it: its own class for transformers, which here cuts nothing silently.

    scorer = Scorer(model, tokenizer, batch=8)
    simple_evaluate(model=scorer, tasks=["piqa"])

The numbers are those of `HFLM(pretrained=folder)`: only what is said of long contexts and of progress differs. The
module needs the extra `eval` and is imported late.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from limbeck.console import progress
from limbeck.errors import LimbeckError


class Scorer(HFLM):
    """`HFLM` around a model that is loaded already.

    Args:
        batch: rows at once, or "auto".
        truncate: cut contexts that are too long on the left, as the harness does, in the place of an error.
    """

    def __init__(self, model: Any, tokenizer: Any, batch: int | str = 8, truncate: bool = False, name: str = "tasks"):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch, backend="causal")
        self.truncate, self.name = truncate, name
        self._advance: Callable[[float], None] = lambda rows: None

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # the last token is predicted, not read: one more than the model reads still fits
        self._refuse([len(context) + len(rest) for _, context, rest in requests], self.max_length + 1)
        with progress(self.name, len(requests), "requests") as advance:
            self._advance = advance
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        with progress(self.name, len(requests), "requests") as advance:
            self._advance = advance
            return super().generate_until(requests, disable_tqdm=True)

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if left_truncate_len is not None:
            self._refuse([len(self.tok_encode(text)) for text in strings], left_truncate_len, "with the answer's room ")
        return super().tok_batch_encode(list(strings), padding_side, left_truncate_len, truncation)

    def _detect_batch_size(self, requests: Sequence | None = None, pos: int = 0) -> int:
        shown, self._advance = self._advance, lambda rows: None
        try:
            return super()._detect_batch_size(requests, pos)
        finally:
            self._advance = shown

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        self._advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = super()._model_generate(context, *args, **kwargs)
        self._advance(len(context))
        return tokens

    def _refuse(self, lengths: list[int], room: int, what: str = "") -> None:
        long = [length for length in lengths if length > room]
        if long and not self.truncate:
            raise LimbeckError(
                f"{len(long)} of {len(lengths)} requests are too long for the model: {max(long):,} tokens",
                expected=f"{what}at most {room:,} tokens",
                hint="fewer examples (few_shot), another task, or tasks.truncate=true, which cuts on the left",
            )
