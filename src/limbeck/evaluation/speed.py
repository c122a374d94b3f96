"""Speed and memory of several models in one race: prompts, the next token, caches, over lengths and batch sizes.

    benchmark = SpeedBenchmark([Candidate.from_subject(teacher), Candidate.from_subject(student)], SpeedSettings(lengths=[1024, 4096]))
    benchmark.check_memory(benchmark.estimate())            # refuses what does not fit
    found = benchmark.run()                     # a Measurement for each entry, in its home after every length

All entries take turns token by token, so what disturbs the machine disturbs all. A length and batch size is measured
for all entries or for none; what an interrupted race has finished is taken from the entries' files.

What a race found of one model: points, one a length and batch size; the numbers of the table; break-even lengths.

A name says what, in which unit, and behind the @ at which length and batch size: `token_milliseconds@4096x1`. Where a
model can decode with a growing and a static cache, the faster of both is its `token_milliseconds`.
"""

import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError
from limbeck.core.system import flush_denormals, get_free_memory, time_reference_matmul
from limbeck.evaluation.measure import Measure, Measurement, MeasureResult, MeasureSettings, collect_provenance
from limbeck.evaluation.speed_entry import Candidate
from limbeck.evaluation.subject import Subject
from limbeck.evaluation.timing import PrefillTiming, TokenTiming, find_break_even, time_decoding, time_prefill
from limbeck.models.quantization import count_weight_bytes

CACHE_KINDS = ("growing", "static")


def build_point(
    name: str, length: int, batch: int, prefills: dict[str, PrefillTiming], tokens: dict[str, TokenTiming]
) -> dict[str, Any]:
    """All that was measured of one model at one length and batch size, ready for JSON.

    Args:
        prefills, tokens: by contestant: the model's name, " / " and the kind of its cache.
    """
    point: dict[str, Any] = {"length": length, "batch": batch, "token": {}}
    prefill = prefills.get(f"{name} / growing")
    if prefill is not None:
        point["prefill"] = {
            "milliseconds": prefill.milliseconds,
            "least": prefill.min_milliseconds,
            "most": prefill.max_milliseconds,
            "extra_bytes": prefill.extra_bytes,
        }
    for kind in CACHE_KINDS:
        token = tokens.get(f"{name} / {kind}")
        if token is not None:
            point["token"][kind] = {
                "milliseconds": token.milliseconds,
                "least": token.min_milliseconds,
                "most": token.max_milliseconds,
                "cache_bytes": token.bytes,
            }
    return point


def min_token_milliseconds(point: dict[str, Any]) -> float:
    """With the faster kind of cache."""
    return min(kind["milliseconds"] for kind in point["token"].values())


def fastest_cache(point: dict[str, Any]) -> dict[str, Any]:
    """The faster kind of cache: milliseconds, least, most, cache_bytes."""
    return min(point["token"].values(), key=lambda kind: kind["milliseconds"])


def summarize_points(points: list[dict[str, Any]], weights: int, parity: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The numbers of the table.

    Args:
        weights: bytes of the model's weights.
        parity: what `find_break_evens` gave; the first rival's lengths are shown.
    """
    values: dict[str, float] = {"weights_bytes": weights}
    for point in points:
        at = f"@{point['length']}x{point['batch']}"
        prefill = point.get("prefill")
        if prefill is not None:
            values[f"first_token_milliseconds{at}"] = prefill["milliseconds"]
            values[f"prefill_tokens_per_second{at}"] = 1000 * point["batch"] * point["length"] / prefill["milliseconds"]
            if prefill["extra_bytes"] is not None:
                values[f"peak_bytes{at}"] = weights + prefill["extra_bytes"]
        values[f"token_milliseconds{at}"] = min_token_milliseconds(point)
        if len(point["token"]) > 1:
            for kind, token in point["token"].items():
                values[f"token_milliseconds_{kind}_cache{at}"] = token["milliseconds"]
        values[f"cache_bytes{at}"] = point["token"]["growing"]["cache_bytes"]
    for batch, lengths in next(iter(parity.values()), {}).items():
        for what, length in lengths.items():
            if length is not None:
                values[f"break_even_{what}_tokens@batch{batch}"] = length
    return values


def find_break_evens(
    points: list[dict[str, Any]], baselines: dict[str, list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """From which length on a model is faster and smaller than each rival, by batch size; None for never.

    Needs two lengths at least; {} for a batch size with fewer.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, theirs in baselines.items():
        found[name] = {}
        for batch in sorted({point["batch"] for point in points}):
            mine = sorted((p for p in points if p["batch"] == batch), key=lambda p: p["length"])
            other = sorted((p for p in theirs if p["batch"] == batch), key=lambda p: p["length"])
            if len(mine) < 2:
                continue
            lengths = [p["length"] for p in mine]
            sizes = [[p["token"]["growing"]["cache_bytes"] for p in of] for of in (other, mine)]
            times = [[min_token_milliseconds(p) for p in of] for of in (other, mine)]
            found[name][str(batch)] = {
                "time": find_break_even(lengths, *times),
                "memory": find_break_even(lengths, *sizes),
            }
    return found


UNSTABLE_RATIO = 1.25  # two timings of the same that differ by so much say that the machine was busy
Positive = Annotated[int, Field(gt=0)]


class SpeedSettings(MeasureSettings):
    """What is raced over. Prompts longer than `prefill` are not timed: only the tokens after them are."""

    lengths: Annotated[list[Positive], Field(min_length=1)] = [1024, 4096]
    batches: Annotated[list[Positive], Field(min_length=1)] = [1]
    steps: Positive = 16
    rounds: Positive = 3
    prefill: Annotated[int, Field(ge=0)] = 8192


@dataclass(frozen=True)
class WorkloadEstimate:
    """What one length and batch size will take."""

    length: int
    batch: int
    seconds: float
    bytes: float  # at most, on top of the models


@dataclass
class SpeedBenchmark:
    """Entries, settings, and what has been measured so far: by length and batch size, by entry."""

    candidates: list[Candidate]
    settings: SpeedSettings
    save_results: bool = True  # write files, and go on from them
    ignore_cache: bool = False  # leave aside what files hold
    notes: list[str] = field(default_factory=list)  # what was found of the machine
    points: dict[tuple[int, int], dict[str, dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.candidates]
        if len(set(names)) < len(names):
            raise LimbeckError(f"the same model twice: {', '.join(names)}", expected="each model once")
        longest = max(self.settings.lengths) + self.settings.steps + 2
        for entry in self.candidates:
            if entry.max_positions is not None and longest > entry.max_positions:
                raise LimbeckError(
                    f"{max(self.settings.lengths):,} tokens and the timed ones are too many for {entry.name}",
                    expected=f"at most {entry.max_positions:,} in all: its positions are learnt",
                )
            entry.probe()
        self.points = self._finished() if self.save_results and not self.ignore_cache else {}

    @property
    def workloads(self) -> list[tuple[int, int]]:
        """Lengths and batch sizes, the cheapest first."""
        pairs = {(n, b) for n in self.settings.lengths for b in self.settings.batches}
        return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair))

    @property
    def fingerprint(self) -> str:
        """Fingerprint of all that timings depend on, but for lengths and batch sizes."""
        facts = {
            "entries": [(e.name, e.weight_format, e.subject.fingerprint) for e in self.candidates],
            "settings": self.settings.model_dump(include={"steps", "rounds", "prefill"}),
            "machine": _circumstances(self.candidates[0]),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def estimate(self) -> list[WorkloadEstimate]:
        """What each length and batch size that is not measured yet will take, from the probes."""
        return [self._estimate(length, batch) for length, batch in self.workloads if (length, batch) not in self.points]

    def check_memory(self, estimates: list[WorkloadEstimate]) -> None:
        """Raises LimbeckError where the memory that is free does not hold a length, and says what it holds."""
        free = get_free_memory(self.candidates[0].model.device)
        if free is None:
            return
        for estimate in estimates:
            if estimate.bytes > free:
                longest = self._longest(estimate.length, estimate.batch, free)
                fits = f"at most {longest:,} tokens at this batch size" if longest else "a smaller batch"
                raise LimbeckError(
                    f"{estimate.length:,} tokens in a batch of {estimate.batch} take {estimate.bytes / 1e9:.1f} GB "
                    f"for caches and activations, {free / 1e9:.1f} GB are free",
                    expected=fits,
                    hint=f"--lengths {longest}" if longest else "--batch 1",
                )

    @flush_denormals()
    def run(self) -> list[Measurement]:
        """Measure what is not measured yet. Each entry's file is written after every length and batch size."""
        open_cells = [cell for cell in self.workloads if cell not in self.points]
        found: list[Measurement] = []
        device, began, first = self.candidates[0].model.device, time.monotonic(), None
        with progress("race", len(self.workloads), "lengths", initial=len(self.workloads) - len(open_cells)) as advance:
            for length, batch in open_cells:
                advance(0, note=f"{length:,} tokens, batch {batch}")
                before = time_reference_matmul(device)
                first = first or before
                self.points[length, batch] = self._measure(length, batch, before)
                if max(before, first) > UNSTABLE_RATIO * min(before, first):
                    self._note(f"a fixed matrix product took {first:.1f} ms at first and {before:.1f} ms later")
                found = self._save(time.monotonic() - began)
                advance(1)
        return found or self._save(0.0)

    def _measure(self, length: int, batch: int, yard: float) -> dict[str, dict[str, Any]]:
        settings = self.settings
        prefills: dict[str, PrefillTiming] = {}
        if length <= settings.prefill:
            alone = [entry.timed_models(growing_only=True)[0] for entry in self.candidates]
            prefills = {p.name: p for p in time_prefill(alone, length, settings.rounds, batch)}
        timed_models = [timed_model for entry in self.candidates for timed_model in entry.timed_models()]
        tokens = {p.name: p for p in time_decoding(timed_models, length, settings.steps, batch=batch)}
        unsteady = [p for p in tokens.values() if not 1 / UNSTABLE_RATIO < p.drift < UNSTABLE_RATIO]
        if 2 * len(unsteady) >= len(tokens):
            self._note(f"at {length:,} tokens the later steps took {unsteady[0].drift:.2f} times the earlier ones")
        return {
            entry.name: build_point(entry.name, length, batch, prefills, tokens) | {"yardstick_milliseconds": yard}
            for entry in self.candidates
        }

    def _save(self, seconds: float) -> list[Measurement]:
        found = []
        done = [cell for cell in self.workloads if cell in self.points]
        points = {entry.name: [self.points[cell][entry.name] for cell in done] for entry in self.candidates}
        for entry in self.candidates:
            others = [e for e in self.candidates if e.is_baseline and not entry.is_baseline]
            own = entry.subject.teacher_or_none.name if entry.subject.teacher_or_none else None
            baselines = {e.name: points[e.name] for e in sorted(others, key=lambda e: e.name != own)}
            parity = find_break_evens(points[entry.name], baselines)
            made = collect_provenance(entry.subject, seconds)
            measurement = Measurement(
                measure="speed",
                model=entry.name,
                teacher=entry.subject.teacher.name if entry.subject.teacher_or_none or entry.is_baseline else None,
                settings=self.settings.model_dump(mode="json"),
                data={"tokens": "arbitrary ones; a dense model's time does not depend on which"},
                values=summarize_points(points[entry.name], count_weight_bytes(entry.model), parity),
                details={
                    "race": self.fingerprint,
                    "entries": [e.name for e in self.candidates],
                    "points": points[entry.name],
                    "break_even": parity,
                    "rivals": baselines,
                    "notes": self.notes,
                },
                provenance=made.model_copy(update={"dtype": entry.weight_format}),
            )
            if self.save_results:
                measurement.save(entry.output_dir)
            found.append(measurement)
        return found

    def _finished(self) -> dict[tuple[int, int], dict[str, dict[str, Any]]]:
        """What the entries' files hold of this race."""
        kept: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
        for entry in self.candidates:
            path = entry.output_dir / "speed.json"
            try:
                known = Measurement.load(path) if path.is_file() else None
            except LimbeckError:
                known = None
            if known is None or known.details.get("race") != self.fingerprint:
                return {}
            self.notes += [note for note in known.details["notes"] if note not in self.notes]
            for point in known.details["points"]:
                kept.setdefault((point["length"], point["batch"]), {})[entry.name] = point
        return {cell: of for cell, of in kept.items() if len(of) == len(self.candidates) and cell in self.workloads}

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _estimate(self, length: int, batch: int) -> WorkloadEstimate:
        steps, settings = self.settings.steps + 2, self.settings
        seconds = sum(entry.estimate_decoding_seconds(length, batch, steps) for entry in self.candidates)
        most = sum(entry.estimate_decoding_bytes(length, batch) for entry in self.candidates)
        if length <= settings.prefill:
            seconds += (settings.rounds + 1) * sum(
                entry.estimate_prefill_seconds(length, batch) for entry in self.candidates
            )
            most = max(most, *(entry.estimate_prefill_bytes(length, batch) for entry in self.candidates))
        return WorkloadEstimate(length, batch, seconds, 1.1 * most)

    def _longest(self, length: int, batch: int, free: float) -> int:
        """The most tokens, a multiple of 256, that fit."""
        low, high = 0, length // 256
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._estimate(256 * middle, batch).bytes <= free
            low, high = (middle, high) if fits else (low, middle - 1)
        return 256 * low


def measure_speed(subject: Subject, settings: SpeedSettings) -> MeasureResult:
    """A race of one model and its teacher; `limbeck bench` races more of them."""
    entries = [Candidate.from_subject(subject)]
    if subject.is_student and subject.teacher_or_none is not None:
        entries.append(Candidate.from_subject(subject.teacher))
    benchmark = SpeedBenchmark(entries, settings, save_results=False)
    benchmark.check_memory(benchmark.estimate())
    found = benchmark.run()[0]
    return MeasureResult(values=found.values, data=found.data, details=found.details)


def _circumstances(entry: Candidate) -> list[Any]:
    made = collect_provenance(entry.subject, 0)
    return [made.versions, made.platform, made.device, made.threads]


def draw_speed(found: list[Measurement]) -> Any:
    from limbeck.report.figures.speed import draw_speed

    return draw_speed(found)


MEASURE = Measure(
    "speed",
    "prompts, the next token, caches and memory, in turns with the teacher",
    SpeedSettings,
    measure_speed,
    draw_speed,
)
