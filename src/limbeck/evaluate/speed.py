"""Speed and memory of several models in one race: prompts, the next token, caches, over lengths and batch sizes.

    race = Race([Entry.of(teacher), Entry.of(student)], SpeedSettings(lengths=[1024, 4096]))
    race.check(race.estimate())            # refuses what does not fit
    found = race.run()                     # a Measurement for each entry, in its home after every length

All entries take turns token by token, so what disturbs the machine disturbs all. A length and batch size is measured
for all entries or for none; what an interrupted race has finished is taken from the entries' files.
"""

import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from limbeck.console import progress
from limbeck.errors import LimbeckError
from limbeck.evaluate.decoding import measure
from limbeck.evaluate.entry import Entry
from limbeck.evaluate.measurement import Measurement
from limbeck.evaluate.measures import Found, Measure, Settings, provenance
from limbeck.evaluate.prefill import Prefill, measure_prefill
from limbeck.evaluate.speed_values import break_evens, point_of, values_of
from limbeck.evaluate.subject import Subject
from limbeck.machine import flushing_denormals, free_memory, yardstick
from limbeck.quantise import model_bytes

UNSTEADY = 1.25  # two timings of the same that differ by so much say that the machine was busy
Positive = Annotated[int, Field(gt=0)]


class SpeedSettings(Settings):
    """What is raced over. Prompts longer than `prefill` are not timed: only the tokens after them are."""

    lengths: Annotated[list[Positive], Field(min_length=1)] = [1024, 4096]
    batches: Annotated[list[Positive], Field(min_length=1)] = [1]
    steps: Positive = 16
    rounds: Positive = 3
    prefill: Annotated[int, Field(ge=0)] = 8192


@dataclass(frozen=True)
class Estimate:
    """What one length and batch size will take."""

    length: int
    batch: int
    seconds: float
    bytes: float  # at most, on top of the models


@dataclass
class Race:
    """Entries, settings, and what has been measured so far: by length and batch size, by entry."""

    entries: list[Entry]
    settings: SpeedSettings
    keep: bool = True  # write files, and go on from them
    again: bool = False  # leave aside what files hold
    notes: list[str] = field(default_factory=list)  # what was found of the machine
    points: dict[tuple[int, int], dict[str, dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if len(set(names)) < len(names):
            raise LimbeckError(f"the same model twice: {', '.join(names)}", expected="each model once")
        longest = max(self.settings.lengths) + self.settings.steps + 2
        for entry in self.entries:
            if entry.limit is not None and longest > entry.limit:
                raise LimbeckError(
                    f"{max(self.settings.lengths):,} tokens and the timed ones are too many for {entry.name}",
                    expected=f"at most {entry.limit:,} in all: its positions are learnt",
                )
            entry.probe()
        self.points = self._finished() if self.keep and not self.again else {}

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Lengths and batch sizes, the cheapest first."""
        pairs = {(n, b) for n in self.settings.lengths for b in self.settings.batches}
        return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair))

    @property
    def key(self) -> str:
        """Fingerprint of all that timings depend on, but for lengths and batch sizes."""
        facts = {
            "entries": [(e.name, e.kind, e.subject.weights) for e in self.entries],
            "settings": self.settings.model_dump(include={"steps", "rounds", "prefill"}),
            "machine": _circumstances(self.entries[0]),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def estimate(self) -> list[Estimate]:
        """What each length and batch size that is not measured yet will take, from the probes."""
        return [self._estimate(length, batch) for length, batch in self.cells if (length, batch) not in self.points]

    def check(self, estimates: list[Estimate]) -> None:
        """Raises LimbeckError where the memory that is free does not hold a length, and says what it holds."""
        free = free_memory(self.entries[0].model.device)
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

    @flushing_denormals()
    def run(self) -> list[Measurement]:
        """Measure what is not measured yet. Each entry's file is written after every length and batch size."""
        open_cells = [cell for cell in self.cells if cell not in self.points]
        found: list[Measurement] = []
        device, began, first = self.entries[0].model.device, time.monotonic(), None
        with progress("race", len(self.cells), "lengths", done=len(self.cells) - len(open_cells)) as advance:
            for length, batch in open_cells:
                advance(0, note=f"{length:,} tokens, batch {batch}")
                before = yardstick(device)
                first = first or before
                self.points[length, batch] = self._measure(length, batch, before)
                if max(before, first) > UNSTEADY * min(before, first):
                    self._note(f"a fixed matrix product took {first:.1f} ms at first and {before:.1f} ms later")
                found = self._save(time.monotonic() - began)
                advance(1)
        return found or self._save(0.0)

    def _measure(self, length: int, batch: int, yard: float) -> dict[str, dict[str, Any]]:
        settings = self.settings
        prefills: dict[str, Prefill] = {}
        if length <= settings.prefill:
            alone = [entry.contestants(growing_only=True)[0] for entry in self.entries]
            prefills = {p.name: p for p in measure_prefill(alone, length, settings.rounds, batch)}
        contestants = [contestant for entry in self.entries for contestant in entry.contestants()]
        tokens = {p.name: p for p in measure(contestants, length, settings.steps, batch=batch)}
        unsteady = [p for p in tokens.values() if not 1 / UNSTEADY < p.drift < UNSTEADY]
        if 2 * len(unsteady) >= len(tokens):
            self._note(f"at {length:,} tokens the later steps took {unsteady[0].drift:.2f} times the earlier ones")
        return {
            entry.name: point_of(entry.name, length, batch, prefills, tokens) | {"yardstick_milliseconds": yard}
            for entry in self.entries
        }

    def _save(self, seconds: float) -> list[Measurement]:
        found = []
        done = [cell for cell in self.cells if cell in self.points]
        points = {entry.name: [self.points[cell][entry.name] for cell in done] for entry in self.entries}
        for entry in self.entries:
            others = [e for e in self.entries if e.reference and not entry.reference]
            own = entry.subject.base.name if entry.subject.base else None
            rivals = {e.name: points[e.name] for e in sorted(others, key=lambda e: e.name != own)}
            parity = break_evens(points[entry.name], rivals)
            made = provenance(entry.subject, seconds)
            measurement = Measurement(
                measure="speed",
                model=entry.name,
                teacher=entry.subject.teacher.name if entry.subject.base or entry.reference else None,
                settings=self.settings.model_dump(mode="json"),
                data={"tokens": "arbitrary ones; a dense model's time does not depend on which"},
                values=values_of(points[entry.name], model_bytes(entry.model), parity),
                details={
                    "race": self.key,
                    "entries": [e.name for e in self.entries],
                    "points": points[entry.name],
                    "break_even": parity,
                    "rivals": rivals,
                    "notes": self.notes,
                },
                provenance=made.model_copy(update={"dtype": entry.kind}),
            )
            if self.keep:
                measurement.save(entry.home)
            found.append(measurement)
        return found

    def _finished(self) -> dict[tuple[int, int], dict[str, dict[str, Any]]]:
        """What the entries' files hold of this race."""
        kept: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
        for entry in self.entries:
            path = entry.home / "speed.json"
            try:
                known = Measurement.load(path) if path.is_file() else None
            except LimbeckError:
                known = None
            if known is None or known.details.get("race") != self.key:
                return {}
            self.notes += [note for note in known.details["notes"] if note not in self.notes]
            for point in known.details["points"]:
                kept.setdefault((point["length"], point["batch"]), {})[entry.name] = point
        return {cell: of for cell, of in kept.items() if len(of) == len(self.entries) and cell in self.cells}

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _estimate(self, length: int, batch: int) -> Estimate:
        steps, settings = self.settings.steps + 2, self.settings
        seconds = sum(entry.decoding_seconds(length, batch, steps) for entry in self.entries)
        most = sum(entry.decoding_bytes(length, batch) for entry in self.entries)
        if length <= settings.prefill:
            seconds += (settings.rounds + 1) * sum(entry.prefill_seconds(length, batch) for entry in self.entries)
            most = max(most, *(entry.prefill_bytes(length, batch) for entry in self.entries))
        return Estimate(length, batch, seconds, 1.1 * most)

    def _longest(self, length: int, batch: int, free: float) -> int:
        """The most tokens, a multiple of 256, that fit."""
        low, high = 0, length // 256
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._estimate(256 * middle, batch).bytes <= free
            low, high = (middle, high) if fits else (low, middle - 1)
        return 256 * low


def measure_speed(subject: Subject, settings: SpeedSettings) -> Found:
    """A race of one model and its teacher; `limbeck bench` races more of them."""
    entries = [Entry.of(subject)]
    if subject.student and subject.base is not None:
        entries.append(Entry.of(subject.teacher))
    race = Race(entries, settings, keep=False)
    race.check(race.estimate())
    found = race.run()[0]
    return Found(values=found.values, data=found.data, details=found.details)


def _circumstances(entry: Entry) -> list[Any]:
    made = provenance(entry.subject, 0)
    return [made.versions, made.platform, made.device, made.threads]


def _draw(found: list[Measurement]) -> Any:
    from limbeck.report.speed import draw

    return draw(found)


MEASURE = Measure(
    "speed",
    "prompts, the next token, caches and memory, in turns with the teacher",
    SpeedSettings,
    measure_speed,
    _draw,
)
