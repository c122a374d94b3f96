"""A conversation with a model: the state is carried from turn to turn, so no earlier turn is read again.

    talk = Conversation(StudentEngine(model), tokenizer, Sampling(temperature=0.7))
    for piece in talk.reply("What is a recurrent state?"):
        print(piece, end="", flush=True)
    talk.reply("And in one sentence?")                        # reads these words and what the template puts around them

What is new in a turn is what the chat template adds to the text so far. A template that shows earlier turns otherwise
than they were (without thoughts, trimmed) cannot be continued so; then the whole conversation is read again, and
`rereadings` counts it.
"""

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.data.special_tokens import encode_prompt, run_tokenizer
from limbeck.models.backbone import LMHead
from limbeck.models.cache import build_cache_kwargs, get_output_cache
from limbeck.models.export.llama_cpp import LlamaCpp
from limbeck.models.generation import check_finite


class Engine(Protocol):
    """What continues a sequence of tokens, keeping its state."""

    def read(self, ids: list[int]) -> Tensor:
        """Read further tokens; return the logits [vocabulary] behind the last one."""

    def reset(self) -> None:
        """Forget all tokens."""


class StudentEngine:
    """A model of transformers, with its cache."""

    def __init__(self, model: Any):
        self.model, self.backbone, self.head = model, model.get_decoder(), LMHead(model)
        self.cache: Any = None

    def read(self, ids: list[int]) -> Tensor:
        tokens = torch.tensor([ids], device=self.model.device)
        with torch.no_grad():
            # the head on the last token alone: on a long message it would cost a third of the pass
            out = self.backbone(input_ids=tokens, **build_cache_kwargs(self.backbone, self.cache))
            self.cache = get_output_cache(out)
            return self.head(out.last_hidden_state[0, -1:])[0]

    def reset(self) -> None:
        self.cache = None


class LlamaCppEngine:
    """A GGUF file in llama.cpp."""

    def __init__(self, engine: LlamaCpp):
        self.engine = engine

    def read(self, ids: list[int]) -> Tensor:
        return torch.from_numpy(self.engine.decode(ids, last_only=True)[0])

    def reset(self) -> None:
        self.engine.reset()


def continue_greedily(engine: Engine, ids: list[int], count: int) -> tuple[list[int], float]:
    """Read a prompt and take the most likely token `count` times, past tokens that end a text.

    Returns:
        the tokens, and how many came in a second; the prompt and the first step, which warms up, are not counted.
    """
    tokens: list[int] = []
    logits, start = engine.read(ids), 0.0
    for number in range(count):
        tokens.append(int(logits.argmax()))
        if number == 1:
            start = time.perf_counter()
        logits = engine.read(tokens[-1:])
    return tokens, (count - 1) / (time.perf_counter() - start)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen."""

    temperature: float = 0.0  # 0: the most likely one
    top_p: float = 1.0  # from the most likely tokens of this total probability
    max_new_tokens: int = 512  # in an answer

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Choose a token by logits [vocabulary]."""
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities = check_finite(torch.softmax(logits.double().cpu() / self.temperature, -1))
        probabilities, order = probabilities.sort(descending=True)
        # the first token that passes the total still belongs to the set
        kept = probabilities.cumsum(-1) - probabilities < self.top_p
        return int(order[torch.multinomial(probabilities * kept, 1, generator=generator)])


class Conversation:
    """A conversation: messages, the text that the engine has read, and the engine's state.

    Args:
        system: a message before the first turn; None for what the template does without one.

    Raises:
        LimbeckError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        sampling: Sampling,
        *,
        system: str | None = None,
        ends: Any = (),
        seed: int = 0,
    ):
        if not tokenizer.chat_template:
            raise LimbeckError(
                "the tokenizer has no chat template, so there is no form for a conversation",
                expected="a student of an instruction-tuned teacher",
                hint="limbeck generate, to continue a text",
            )
        self.engine, self.tokenizer, self.sampling = engine, tokenizer, sampling
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.ends = {token for token in (tokenizer.eos_token_id, *ends) if token is not None}
        self.text = ""  # what the engine has read
        self.num_tokens = 0  # of it
        self.rereadings = 0
        self.generator = torch.Generator().manual_seed(seed)

    def reply(self, message: str) -> Generator[str, None, int]:
        """Yield the answer to a message in pieces; return its number of tokens."""
        self.messages.append({"role": "user", "content": message})
        rendered = self._render()
        logits = self._read_text(rendered)
        answer: list[int] = []
        shown, ended = "", None
        for _ in range(self.sampling.max_new_tokens):
            token = self.sampling.choose(logits, self.generator)
            logits = self._read([token])
            if token in self.ends:
                ended = token
                break
            answer.append(token)
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # the bytes of a character may be several tokens
                yield text[len(shown) :]
                shown = text
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        yield text[len(shown) :]
        self.messages.append({"role": "assistant", "content": text})
        # with control tokens that were not shown: the state has them, and a template that lacks them cannot continue it
        self.text = rendered + self.tokenizer.decode(answer if ended is None else [*answer, ended])
        return len(answer)

    def _render(self) -> str:
        """Write the messages as the chat template does; raises LimbeckError for those that it refuses."""
        # late: transformers needs it for templates alone
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise LimbeckError(
                f"the chat template refuses the conversation: {error}",
                expected="the roles that it knows",
                hint="leave out --system" if self.messages[0]["role"] == "system" else "limbeck generate",
            ) from error

    def _read_text(self, rendered: str) -> Tensor:
        """Read what a rendered conversation adds to the text so far, or all of it if it does not continue that text."""
        if self.text and rendered.startswith(self.text) and len(rendered) > len(self.text):
            new = run_tokenizer(self.tokenizer, rendered[len(self.text) :], split_special_tokens=False)["input_ids"]
            return self._read(new)
        if self.text:
            self.rereadings += 1
            self.engine.reset()
            self.num_tokens = 0
        return self._read(encode_prompt(self.tokenizer, rendered))

    def _read(self, ids: list[int]) -> Tensor:
        self.num_tokens += len(ids)
        return self.engine.read(ids)


def list_end_tokens(model: Any) -> list[int]:
    """Return the tokens at which a model's generation config ends an answer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return [ends] if isinstance(ends, int) else list(ends or [])
