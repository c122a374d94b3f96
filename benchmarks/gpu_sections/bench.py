"""What all sections share: the clock, the budget of seconds, cases that may fail, and the models to measure on.

bench = Bench(device, dry=False, seconds=500)
bench.case({"tokens": 2048}, lambda: {"ms": bench.milliseconds(step)})
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import limbeck
from limbeck.data.packing import Batch
from limbeck.training.precision import resolve_autocast

# the real shapes; "tiny" is what the dry mode runs
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "360m": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15},
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
}
KV_HEADS = {"135m": 3, "360m": 5, "tiny": 1}


@dataclass
class Bench:
    """Where, for how long, and what was found.

    Args:
        dry: tiny shapes, one repetition: everything runs through, and no figure means anything.
        seconds: after which no case of a section begins any more.
        options: of the command line (teacher, mixers, lengths, ...).
    """

    device: torch.device
    dry: bool
    seconds: float
    options: Any
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    compiled_for: tuple[int, str] | None = None

    @property
    def repeats(self) -> int:
        return 1 if self.dry else self.options.repeats

    @property
    def shapes(self) -> list[str]:
        """Names of the models to measure on."""
        return ["tiny"] if self.dry else self.options.models.split(",")

    @property
    def mixers(self) -> list[str]:
        return self.options.mixers.split(",")[: 1 if self.dry else None]

    def case(self, label: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure a case, unless the budget is spent; what goes wrong is told in its row."""
        if time.monotonic() - self.began > self.seconds:
            row = {**label, "told": "not reached: the section's seconds were over"}
        else:
            try:
                row = {**label, **work()}
            except torch.OutOfMemoryError:
                row = {**label, "told": "out of memory"}
            except Exception as error:
                row = {**label, "told": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.rows.append(row)
        return row

    def milliseconds(self, work: Callable[[], Any], repeats: int | None = None, warm: int = 3) -> float:
        """Median of the calls, after some that are not counted; on a GPU between two events."""
        for _ in range(1 if self.dry else warm):
            work()
        return statistics.median(self._once(work) for _ in range(repeats or self.repeats))

    def _once(self, work: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            work()
            return 1000 * (time.perf_counter() - began)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)

    def timed_step(self, work: Callable[[], Any], tokens: int, warm: int = 3) -> dict[str, Any]:
        """A step's time, tokens a second and peak memory, that of models, gradients and optimiser included."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        spent = self.milliseconds(work, warm=warm)
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None
        return {"ms": round(spent, 3), "tokens_per_s": round(1000 * tokens / spent), "peak_gb": peak and round(peak, 2)}

    # ------------------------------------------------------------------ models

    def autocast(self) -> Any:
        """bf16 on a GPU, nothing on a CPU; see `limbeck.training.precision`."""
        return resolve_autocast("auto", self.device)

    def teacher(self, shape: str, length: int) -> LlamaForCausalLM:
        """A frozen teacher: a real one where --teacher names a folder, else random weights of the real shape."""
        if self.options.teacher and not self.dry:
            model = AutoModelForCausalLM.from_pretrained(self.options.teacher, dtype=torch.float32)
        else:
            torch.manual_seed(0)
            config = LlamaConfig(
                **SHAPES[shape],
                num_key_value_heads=KV_HEADS[shape],
                vocab_size=256 if self.dry else 49152,
                max_position_embeddings=max(length, 8192),
                tie_word_embeddings=True,
                rope_theta=100000.0,
            )
            with torch.device(self.device):
                model = LlamaForCausalLM(config)
        return model.to(self.device).eval().requires_grad_(False)

    def student(self, teacher: LlamaForCausalLM, mixer: str, share: bool = False) -> Any:
        if self.compiled_for != (id(teacher), mixer):  # what was compiled for others counts against a limit
            torch._dynamo.reset()
            self.compiled_for = (id(teacher), mixer)
        torch.manual_seed(0)
        return limbeck.convert(teacher, mixer, share_weights=share).requires_grad_(False)

    def batch(self, teacher: LlamaForCausalLM, rows: int, length: int, document: int | None = None) -> Batch:
        """Random tokens on the CPU, in packed documents of `document` tokens (one a row by default)."""
        ids = torch.randint(0, teacher.config.vocab_size, (rows, length))
        positions = (torch.arange(length) % (document or length)).repeat(rows, 1)
        targets = ids.roll(-1, 1)
        targets[:, -1] = -100
        return Batch(ids, positions, targets)
