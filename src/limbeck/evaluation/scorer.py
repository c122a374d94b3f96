"""A loaded model as lm-evaluation-harness wants it: its own class for transformers, which here cuts nothing silently.

    scorer = PreloadedHFLM(model, tokenizer, max_length=4096, overlong="middle")
    simple_evaluate(model=scorer, tasks=["piqa", "longbench_qasper"])
    scorer.truncated_prompts         # which prompts were cut, from how many tokens to how many

For what fits the numbers are those of `HFLM(pretrained=folder)`, but for tokenizers that end a text with EOS and
generation configs that change probabilities: neither is let into a prompt or an answer here. That class drops the left
end of what does not fit, instructions first, with a warning in a log. Here all requests of a call are counted before
the first one runs, and what does not fit is an error, or is cut as was asked (`limbeck.evaluation.truncation`). Prompts that
are to be continued are read in pieces, so that a student's memory does not grow with them. The module needs the extra
`eval` and is imported late.
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

PREFILL_CHUNK_SIZE = 1024  # tokens of a prompt that are read at a time


@dataclass(frozen=True)
class TruncatedPrompt:
    """A prompt that was cut: of which task and item, its tokens before and after."""

    task: str
    item: int
    tokens: int
    kept: int


class PreloadedHFLM(HFLM):
    """`HFLM` around a model that is loaded already.

    Args:
        batch_size: rows at once, or "auto".
        max_length: tokens of prompt and answer together; by default the model's context.
        overlong: what becomes of a prompt that does not fit, see `truncate_prompt`.
        prefill_chunk_size: tokens of a prompt that are read at a time before it is continued.

    Raises:
        LimbeckError: more length is asked for than the model has.
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
        ready = []
        for at, (texts, context, rest) in enumerate(requests):
            # The last token is predicted, not read: one more than the model reads still fits.
            room = compute_max_prompt_length(self.max_length + 1, len(rest), min_prompt_length=1)
            ready.append((texts, self._fit(context, room, self.name, at), rest))
        self._tell()
        with progress(self.name, len(ready), "requests") as advance:
            self._advance = advance
            return super()._loglikelihood_tokens(ready, disable_tqdm=True, override_bs=override_bs)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        for request in requests:
            prompt, settings = request.args
            answer = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            task = request.task_name or self.name
            self._fit(
                self._encoded(prompt),
                compute_max_prompt_length(self.max_length, answer, task),
                task,
                request.doc_id or 0,
            )
        self._tell()
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
        """Prompts as a padded batch, tokens and mask [B, T], each cut by itself."""
        rows = [self._encoded(text) for text in strings]
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
        """A prompt as everywhere in Limbeck: behind BOS where the tokenizer puts one, never with an EOS at its end."""
        ids = (
            run_tokenizer(self.tokenizer, string)["input_ids"] if add_special_tokens is False else self._encoded(string)
        )
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encoded(self, text: str) -> list[int]:
        return encode_prompt(self.tokenizer, text)

    def _fit(self, ids: list[int], room: int, task: str, item: int) -> list[int]:
        kept = truncate_prompt(ids, room, self.overlong, f"the prompt of {task}, item {item},")
        if len(kept) < len(ids):
            self.truncated_prompts.append(TruncatedPrompt(task, item, len(ids), len(kept)))
        return kept

    def _tell(self) -> None:
        if self.truncated_prompts:
            longest = max(cut.tokens for cut in self.truncated_prompts)
            console.print(
                f"{self.name}: {len(self.truncated_prompts)} prompts do not fit into {self.max_length:,} tokens with their answers "
                f"(the longest has {longest:,}) and are cut ({self.overlong})"
            )

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
        tokens = super()._model_generate(context, *args, prefill_chunk_size=self.prefill_chunk_size, **kwargs)
        self._advance(len(context))
        return tokens
