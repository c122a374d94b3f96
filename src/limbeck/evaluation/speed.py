"""The measure `speed` and the benchmark behind `limbeck bench`: prefill, decoding, caches and memory of several models.

    candidates = [Candidate.from_subject(teacher), Candidate.from_subject(student)]
    benchmark = SpeedBenchmark(candidates, SpeedSettings(lengths=[1024, 4096]))
    benchmark.check_memory(benchmark.estimate())
    measurements = benchmark.run()          # one per candidate, saved after every length
    measurements[1].values["token_milliseconds@4096x1"], measurements[1].values["break_even_time_tokens@batch1"]

All candidates take turns token by token, so that a disturbance of the machine affects all of them. A workload, a length
and batch size, is measured for all candidates or for none; an interrupted benchmark resumes from its files. Names of
values say what, in which unit, and after the @ at which length and batch size. If a model can decode with a growing and
a static cache, the faster of both is its `token_milliseconds`.
"""

import time
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from limbeck.core.console import progress
from limbeck.core.digests import digest_facts
from limbeck.core.errors import LimbeckError
from limbeck.core.system import flush_denormals, get_free_memory, time_reference_matmul
from limbeck.evaluation.candidate import Candidate
from limbeck.evaluation.measure import Measure, Measurement, MeasureResult, MeasureSettings, collect_provenance
from limbeck.evaluation.subject import Subject
from limbeck.evaluation.timing import PrefillTiming, TokenTiming, find_break_even, time_decoding, time_prefill
from limbeck.models.quantization import count_weight_bytes

CACHE_KINDS = ("growing", "static")
UNSTABLE_RATIO = 1.25  # a larger ratio of two timings of the same work means that the machine was busy
Positive = Annotated[int, Field(gt=0)]


class SpeedSettings(MeasureSettings):
    """Settings of the measure `speed`.

    lengths: tokens of context.
    batches: batch sizes.
    steps: tokens timed at each length.
    rounds: prefills timed at each length.
    prefill: longest prompt whose prefill is timed; for longer ones only decoding is.
    """

    lengths: Annotated[list[Positive], Field(min_length=1)] = [1024, 4096]
    batches: Annotated[list[Positive], Field(min_length=1)] = [1]
    steps: Positive = 16
    rounds: Positive = 3
    prefill: Annotated[int, Field(ge=0)] = 8192


def measure_speed(subject: Subject, settings: SpeedSettings) -> MeasureResult:
    """Benchmark a model and its teacher; `limbeck bench` compares more models."""
    candidates = [Candidate.from_subject(subject)]
    if subject.is_student and subject.teacher_or_none is not None:
        candidates.append(Candidate.from_subject(subject.teacher))
    benchmark = SpeedBenchmark(candidates, settings, save_results=False)
    benchmark.check_memory(benchmark.estimate())
    measurement = benchmark.run()[0]
    return MeasureResult(values=measurement.values, data=measurement.data, details=measurement.details)


@dataclass(frozen=True)
class WorkloadEstimate:
    """Estimated time and memory of one length and batch size.

    bytes: upper limit, in addition to the models.
    """

    length: int
    batch: int
    seconds: float
    bytes: float


@dataclass
class SpeedBenchmark:
    """A benchmark of several candidates.

    save_results: write measurements, and resume from them.
    ignore_cache: do not resume.
    notes: remarks on the state of the machine.
    points: results so far: (length, batch size) -> name of a candidate -> `build_point`.
    """

    candidates: list[Candidate]
    settings: SpeedSettings
    save_results: bool = True
    ignore_cache: bool = False
    notes: list[str] = field(default_factory=list)
    points: dict[tuple[int, int], dict[str, dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [candidate.name for candidate in self.candidates]
        if len(set(names)) < len(names):
            raise LimbeckError(f"duplicate models: {', '.join(names)}", expected="each model once")
        longest = max(self.settings.lengths) + self.settings.steps + 2
        for candidate in self.candidates:
            if candidate.max_positions is not None and longest > candidate.max_positions:
                raise LimbeckError(
                    f"{max(self.settings.lengths):,} tokens and the timed ones exceed the learned position embeddings "
                    f"of {candidate.name}",
                    expected=f"at most {candidate.max_positions:,} tokens in all",
                )
            candidate.probe()
        self.points = self._load_points() if self.save_results and not self.ignore_cache else {}

    @property
    def workloads(self) -> list[tuple[int, int]]:
        """Lengths and batch sizes, the cheapest first."""
        pairs = {(length, batch) for length in self.settings.lengths for batch in self.settings.batches}
        return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair))

    @property
    def fingerprint(self) -> str:
        """Fingerprint of everything that timings depend on, except lengths and batch sizes."""
        machine = collect_provenance(self.candidates[0].subject, 0)
        facts = {
            "entries": [(c.name, c.weight_format, c.subject.fingerprint) for c in self.candidates],
            "settings": self.settings.model_dump(include={"steps", "rounds", "prefill"}),
            "machine": [machine.versions, machine.platform, machine.device, machine.threads],
        }
        return digest_facts(facts, 16)

    def estimate(self) -> list[WorkloadEstimate]:
        """Estimate every workload that is not measured yet, from the candidates' probes."""
        return [self._estimate(*workload) for workload in self.workloads if workload not in self.points]

    def check_memory(self, estimates: list[WorkloadEstimate]) -> None:
        """Raises LimbeckError, with the longest possible length, if a workload does not fit into free memory."""
        free = get_free_memory(self.candidates[0].model.device)
        if free is None:
            return
        for estimate in estimates:
            if estimate.bytes > free:
                longest = self._find_longest_fit(estimate.length, estimate.batch, free)
                raise LimbeckError(
                    f"{estimate.length:,} tokens at batch size {estimate.batch} need {estimate.bytes / 1e9:.1f} GB "
                    f"for caches and activations, {free / 1e9:.1f} GB are free",
                    expected=f"at most {longest:,} tokens at this batch size" if longest else "a smaller batch",
                    hint=f"--lengths {longest}" if longest else "--batch-sizes 1",
                )

    @flush_denormals()
    def run(self) -> list[Measurement]:
        """Measure all workloads that are not measured yet; measurements are saved after each of them."""
        device, start, first_reference = self.candidates[0].model.device, time.monotonic(), None
        workloads = [workload for workload in self.workloads if workload not in self.points]
        n_done = len(self.workloads) - len(workloads)
        measurements: list[Measurement] = []
        with progress("benchmark", len(self.workloads), "lengths", initial=n_done) as advance:
            for length, batch in workloads:
                advance(0, note=f"{length:,} tokens, batch {batch}")
                # The same product every time: its time shows whether the machine is as fast as before.
                reference = time_reference_matmul(device)
                first_reference = first_reference or reference
                self.points[length, batch] = self._measure(length, batch, reference)
                if max(reference, first_reference) > UNSTABLE_RATIO * min(reference, first_reference):
                    self._add_note(
                        f"a reference matrix product took {first_reference:.1f} ms at first and "
                        f"{reference:.1f} ms later"
                    )
                measurements = self._build_measurements(time.monotonic() - start)
                advance(1)
        return measurements or self._build_measurements(0.0)

    def _measure(self, length: int, batch: int, reference_matmul_ms: float) -> dict[str, dict[str, Any]]:
        """Measure one workload; returns a point for each candidate."""
        prefills: dict[str, PrefillTiming] = {}
        if length <= self.settings.prefill:
            growing = [candidate.timed_models(growing_only=True)[0] for candidate in self.candidates]
            prefills = {t.name: t for t in time_prefill(growing, length, self.settings.rounds, batch)}
        timed_models = [timed_model for candidate in self.candidates for timed_model in candidate.timed_models()]
        tokens = {t.name: t for t in time_decoding(timed_models, length, self.settings.steps, batch=batch)}
        drifting = [t for t in tokens.values() if not 1 / UNSTABLE_RATIO < t.drift < UNSTABLE_RATIO]
        # All take turns, so a busy machine slows most of them; a single one may have reasons of its own.
        if 2 * len(drifting) >= len(tokens):
            ratio = drifting[0].drift
            self._add_note(f"at {length:,} tokens later steps took {ratio:.2f} times as long as earlier ones")
        return {
            candidate.name: build_point(candidate.name, length, batch, prefills, tokens)
            | {"yardstick_milliseconds": reference_matmul_ms}
            for candidate in self.candidates
        }

    def _build_measurements(self, seconds: float) -> list[Measurement]:
        """Build, and save if requested, the measurement of each candidate from all points so far."""
        measurements = []
        measured = [workload for workload in self.workloads if workload in self.points]
        points = {c.name: [self.points[workload][c.name] for workload in measured] for c in self.candidates}
        for candidate in self.candidates:
            subject = candidate.subject
            teacher = subject.teacher_or_none.name if subject.teacher_or_none else None
            baselines = [c.name for c in self.candidates if c.is_baseline and not candidate.is_baseline]
            baselines.sort(key=lambda name: name != teacher)  # its own teacher first: the table shows only one
            baseline_points = {name: points[name] for name in baselines}
            break_evens = find_break_evens(points[candidate.name], baseline_points)
            provenance = collect_provenance(subject, seconds)
            measurement = Measurement(
                measure="speed",
                model=candidate.name,
                teacher=subject.teacher.name if subject.teacher_or_none or candidate.is_baseline else None,
                settings=self.settings.model_dump(mode="json"),
                data={"tokens": "arbitrary ones; a dense model's time does not depend on which"},
                values=summarize_points(points[candidate.name], count_weight_bytes(candidate.model), break_evens),
                details={
                    "race": self.fingerprint,
                    "entries": [c.name for c in self.candidates],
                    "points": points[candidate.name],
                    "break_even": break_evens,
                    "rivals": baseline_points,
                    "notes": self.notes,
                },
                provenance=provenance.model_copy(update={"dtype": candidate.weight_format}),
            )
            if self.save_results:
                measurement.save(candidate.output_dir)
            measurements.append(measurement)
        return measurements

    def _load_points(self) -> dict[tuple[int, int], dict[str, dict[str, Any]]]:
        """Load the workloads that saved measurements of this benchmark have for all candidates."""
        points: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
        for candidate in self.candidates:
            path = candidate.output_dir / "speed.json"
            try:
                saved = Measurement.load(path) if path.is_file() else None
            except LimbeckError:
                saved = None
            if saved is None or saved.details.get("race") != self.fingerprint:
                return {}
            for note in saved.details["notes"]:
                self._add_note(note)
            for point in saved.details["points"]:
                points.setdefault((point["length"], point["batch"]), {})[candidate.name] = point
        return {
            workload: by_candidate
            for workload, by_candidate in points.items()
            if len(by_candidate) == len(self.candidates) and workload in self.workloads
        }

    def _add_note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _estimate(self, length: int, batch: int) -> WorkloadEstimate:
        steps, settings = self.settings.steps + 2, self.settings
        seconds = sum(c.estimate_decoding_seconds(length, batch, steps) for c in self.candidates)
        # The caches of all candidates exist at the same time; prefills run one after the other.
        memory = sum(c.estimate_decoding_bytes(length, batch) for c in self.candidates)
        if length <= settings.prefill:
            prefill_seconds = sum(c.estimate_prefill_seconds(length, batch) for c in self.candidates)
            seconds += (settings.rounds + 1) * prefill_seconds
            memory = max(memory, *(c.estimate_prefill_bytes(length, batch) for c in self.candidates))
        return WorkloadEstimate(length, batch, seconds, 1.1 * memory)

    def _find_longest_fit(self, length: int, batch: int, free: float) -> int:
        """Find the largest multiple of 256 tokens that fits into free memory."""
        low, high = 0, length // 256
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._estimate(256 * middle, batch).bytes <= free
            low, high = (middle, high) if fits else (low, middle - 1)
        return 256 * low


def build_point(
    name: str, length: int, batch: int, prefills: dict[str, PrefillTiming], tokens: dict[str, TokenTiming]
) -> dict[str, Any]:
    """Collect all timings of one model at one length and batch size, as JSON.

    Args:
        prefills, tokens: timings by the name of the model, " / " and the kind of its cache.
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


def fastest_cache(point: dict[str, Any]) -> dict[str, Any]:
    """Select the faster kind of cache: milliseconds, least, most, cache_bytes."""
    return min(point["token"].values(), key=lambda token: token["milliseconds"])


def min_token_milliseconds(point: dict[str, Any]) -> float:
    """Time of a token with the faster kind of cache."""
    return fastest_cache(point)["milliseconds"]


def summarize_points(
    points: list[dict[str, Any]], weight_bytes: int, break_evens: dict[str, dict[str, Any]]
) -> dict[str, float]:
    """Compute the values of the table.

    Args:
        weight_bytes: size of the model's weights.
        break_evens: output of `find_break_evens`; those with the first baseline are shown.
    """
    values: dict[str, float] = {"weights_bytes": weight_bytes}
    for point in points:
        suffix = f"@{point['length']}x{point['batch']}"
        prefill = point.get("prefill")
        if prefill is not None:
            tokens_per_second = 1000 * point["batch"] * point["length"] / prefill["milliseconds"]
            values[f"first_token_milliseconds{suffix}"] = prefill["milliseconds"]
            values[f"prefill_tokens_per_second{suffix}"] = tokens_per_second
            if prefill["extra_bytes"] is not None:
                values[f"peak_bytes{suffix}"] = weight_bytes + prefill["extra_bytes"]
        values[f"token_milliseconds{suffix}"] = min_token_milliseconds(point)
        if len(point["token"]) > 1:
            for kind, token in point["token"].items():
                values[f"token_milliseconds_{kind}_cache{suffix}"] = token["milliseconds"]
        values[f"cache_bytes{suffix}"] = point["token"]["growing"]["cache_bytes"]
    for batch, lengths in next(iter(break_evens.values()), {}).items():
        for quantity, length in lengths.items():
            if length is not None:
                values[f"break_even_{quantity}_tokens@batch{batch}"] = length
    return values


def find_break_evens(
    points: list[dict[str, Any]], baselines: dict[str, list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Find the lengths from which a model is faster and smaller than each baseline, by batch size; None for never.

    Batch sizes with fewer than two lengths are left out.
    """
    break_evens: dict[str, dict[str, Any]] = {}
    for name, baseline_points in baselines.items():
        break_evens[name] = {}
        for batch in sorted({point["batch"] for point in points}):
            own, baseline = (
                sorted((p for p in candidate if p["batch"] == batch), key=lambda p: p["length"])
                for candidate in (points, baseline_points)
            )
            if len(own) < 2:
                continue
            lengths = [p["length"] for p in own]
            times = [[min_token_milliseconds(p) for p in series] for series in (baseline, own)]
            sizes = [[p["token"]["growing"]["cache_bytes"] for p in series] for series in (baseline, own)]
            break_evens[name][str(batch)] = {
                "time": find_break_even(lengths, *times),
                "memory": find_break_even(lengths, *sizes),
            }
    return break_evens


MEASURE = Measure(
    "speed",
    "prefill, next token, caches and memory, in turns with the teacher",
    SpeedSettings,
    measure_speed,
)
