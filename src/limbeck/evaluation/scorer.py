"""Adapter of lm-evaluation-harness for a loaded model: its class for transformers, without silent truncation.

    scorer = PreloadedHFLM(model, tokenizer, max_length=4096, overlong="middle")
    simple_evaluate(model=scorer, tasks=["piqa", "longbench_qasper"])
    scorer.truncated_prompts         # which prompts were truncated, from how many tokens to how many

For requests that fit, scores are those of `HFLM(pretrained=folder)`, except for tokenizers that append EOS and
generation configs that change probabilities: neither affects a prompt or an answer here. `HFLM` drops the left end of
what does not fit, instructions first, with a warning in a log. Here all requests of a call are checked before the first
one runs, and a prompt that does not fit is an error or is truncated as requested (`limbeck.evaluation.truncation`).
Prompts to be continued are prefilled in chunks, so that a student's memory does not grow with them.

Needs the extra `eval`; import it late.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from limbeck.core.console import console, progress
from limbeck.data.special_tokens import encode_prompt, run_tokenizer
from limbeck.evaluation.truncation import OverlongPolicy, compute_max_prompt_length, resolve_max_length, truncate_prompt
from limbeck.models.generation import with_default_generation_config

PREFILL_CHUNK_SIZE = 1024  # tokens


@dataclass(frozen=True)
class TruncatedPrompt:
    """A prompt that was truncated from `tokens` to `kept` tokens."""

    task: str
    item: int
    tokens: int
    kept: int


class PreloadedHFLM(HFLM):
    """`HFLM` with a model that is loaded already.

    Args:
        batch_size: batch size, or "auto".
        max_length: tokens of prompt and answer together; by default the model's context.
        overlong: treatment of prompts that do not fit, see `truncate_prompt`.
        name: title of the progress bar.
        prefill_chunk_size: tokens per forward pass over a prompt that is to be continued.

    Raises:
        LimbeckError: `max_length` exceeds the model's context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int | str = 8,
        max_length: int | None = None,
        overlong: OverlongPolicy = "refuse",
        name: str = "tasks",
        prefill_chunk_size: int = PREFILL_CHUNK_SIZE,
    ):
        context = resolve_max_length(model, tokenizer, max_length)
        super().__init__(
            pretrained=with_default_generation_config(model, tokenizer),
            tokenizer=tokenizer,
            batch_size=batch_size,
            backend="causal",
            max_length=context,
        )
        self.overlong, self.name, self.prefill_chunk_size = overlong, name, prefill_chunk_size
        self.truncated_prompts: list[TruncatedPrompt] = []
        self._advance: Callable[[float], None] = lambda rows: None

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        fitted = []
        for index, (texts, context, continuation) in enumerate(requests):
            # The last token is predicted, not read: one more than the model reads still fits.
            room = compute_max_prompt_length(self.max_length + 1, len(continuation), min_prompt_length=1)
            fitted.append((texts, self._fit_prompt(context, room, self.name, index), continuation))
        self._report_truncation()
        with progress(self.name, len(fitted), "requests") as advance:
            self._advance = advance
            return super()._loglikelihood_tokens(fitted, disable_tqdm=True, override_bs=override_bs)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Continue the prompts; all of them are checked before the first one runs."""
        for request in requests:
            prompt, settings = request.args
            answer = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            task = request.task_name or self.name
            room = compute_max_prompt_length(self.max_length, answer, task)
            # For its check and record only: the harness tokenizes again, see `tok_batch_encode`.
            self._fit_prompt(encode_prompt(self.tokenizer, prompt), room, task, request.doc_id or 0)
        self._report_truncation()
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
        """Encode prompts as a padded batch, tokens and mask [B, T]; each is truncated by itself."""
        rows = [encode_prompt(self.tokenizer, text) for text in strings]
        if left_truncate_len is not None:
            rows = [truncate_prompt(row, left_truncate_len, self.overlong) for row in rows]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Encode a prompt as everywhere in Limbeck: after BOS if the tokenizer has one, without EOS at its end."""
        if add_special_tokens is False:
            ids = run_tokenizer(self.tokenizer, string)["input_ids"]
        else:
            ids = encode_prompt(self.tokenizer, string)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _fit_prompt(self, ids: list[int], room: int, task: str, item: int) -> list[int]:
        truncated = truncate_prompt(ids, room, self.overlong, f"the prompt of {task}, item {item},")
        if len(truncated) < len(ids):
            self.truncated_prompts.append(TruncatedPrompt(task, item, len(ids), len(truncated)))
        return truncated

    def _report_truncation(self) -> None:
        if self.truncated_prompts:
            longest = max(prompt.tokens for prompt in self.truncated_prompts)
            console.print(
                f"{self.name}: truncating {len(self.truncated_prompts)} prompts ({self.overlong}) that do not fit into "
                f"{self.max_length:,} tokens with their answers; the longest has {longest:,} tokens",
                markup=False,
            )

    def _detect_batch_size(self, requests: Sequence | None = None, pos: int = 0) -> int:
        # Its trial runs are no requests, so they must not move the progress bar.
        advance, self._advance = self._advance, lambda rows: None
        try:
            return super()._detect_batch_size(requests, pos)
        finally:
            self._advance = advance

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        self._advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = super()._model_generate(context, *args, prefill_chunk_size=self.prefill_chunk_size, **kwargs)
        self._advance(len(context))
        return tokens
