"""The harness' model that cuts nothing in silence, and reads long prompts in pieces.

    lm = GuardedLM(model, tokenizer, length=4096, overlong="middle", batch_size=1)
    lm_eval.simple_evaluate(lm, tasks=["long_hotpotqa"])
    lm.cuts                     # which prompts were cut, from how many tokens to how many

lm-evaluation-harness drops the left end of what does not fit, instructions first, with a warning in a log. Here all
requests of a call are counted before the first one runs: what does not fit is an error, or is cut in the middle as
LongBench does.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs

from limbeck.console import console
from limbeck.evaluate.fitting import Overlong, context_of, fitted, room_for_prompt


@dataclass(frozen=True)
class Cut:
    """A prompt that was cut: of which task and item, its tokens before and after."""

    task: str
    item: int
    tokens: int
    kept: int


class GuardedLM(HFLM):
    """transformers' model in the harness, under guard.

    Args:
        length: tokens of prompt and answer together; by default the model's context.
        overlong: what becomes of a prompt that does not fit, see `fitted`.
        piece: tokens of a prompt that are read at a time; memory for a student does not grow beyond that.
        harness: what the harness' class takes besides, such as `batch_size`.

    Raises:
        LimbeckError: more length is asked for than the model has.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        length: int | None = None,
        overlong: Overlong = "refuse",
        piece: int = 1024,
        **harness: Any,
    ):
        self.overlong, self.piece = overlong, piece
        self.cuts: list[Cut] = []
        context = context_of(model, tokenizer, length)
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=context, **harness)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to prompts; all of them are counted first."""
        for request in requests:
            prompt, settings = request.args
            answer = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            task, item = request.task_name or "a task", request.doc_id or 0
            room = room_for_prompt(self.max_length, answer, task)
            self._count(self._encoded(prompt), room, task, item, f"the prompt of {task}, item {item},")
        self._tell()
        return super().generate_until(requests, disable_tqdm)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts as a padded batch, each cut by itself.

        Returns:
            tokens and mask, both [B, T].
        """
        rows = [self._encoded(string) for string in strings]
        if left_truncate_len is not None:
            rows = [fitted(row, left_truncate_len, self.overlong) for row in rows]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def _encoded(self, text: str) -> list[int]:
        """As the harness does: no second beginning-of-text before one that a chat template has written."""
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        if has_bos_prefix(text, getattr(self.tokenizer, "bos_token", None)):
            special = {"add_special_tokens": False}
        return self.tokenizer(text, **special)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **harness: Any
    ) -> list[tuple[float, bool]]:
        """Likelihoods of continuations; the last token of one is never read, so there is room for one more."""
        ready = []
        for item, (texts, context, continuation) in enumerate(requests):
            room = room_for_prompt(self.max_length + 1, len(continuation), "a continuation")
            self._count(context, room, "likelihood", item, f"the context of request {item}")
            ready.append((texts, fitted(context, room, self.overlong), continuation))
        self._tell()
        return super()._loglikelihood_tokens(ready, **harness)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, prefill_chunk_size=self.piece, **settings)

    def _count(self, ids: list[int], room: int, task: str, item: int, what: str) -> None:
        kept = len(fitted(ids, room, self.overlong, what))
        if kept < len(ids):
            self.cuts.append(Cut(task, item, len(ids), kept))

    def _tell(self) -> None:
        if self.cuts:
            longest = max(cut.tokens for cut in self.cuts)
            console.print(
                f"{len(self.cuts)} prompts do not fit into {self.max_length} tokens with their answers "
                f"(the longest has {longest}): cut, {self.overlong}"
            )

    def cut_details(self) -> list[dict[str, Any]]:
        """`cuts` for a measurement's details."""
        return [asdict(cut) for cut in self.cuts]
