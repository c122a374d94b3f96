"""limbeck bench: what a race measures, keeps and refuses, and the figures made of it."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.cli import bench as _bench  # noqa: F401  registers the verb
from limbeck.core import system
from limbeck.core.errors import LimbeckError
from limbeck.evaluation import measure as measures
from limbeck.evaluation import speed, timing
from limbeck.evaluation.candidate import Candidate
from limbeck.evaluation.measure import Measurement, Provenance
from limbeck.evaluation.speed import SpeedBenchmark, SpeedSettings, find_break_evens
from limbeck.evaluation.subject import SubjectLoader
from limbeck.models import convert
from limbeck.report import comparison
from limbeck.report.figures import speed as figures
from limbeck.testing import make_tiny_model

SMALL = SpeedSettings(lengths=[64, 320], batches=[1, 2], steps=4, rounds=1, prefill=64)
FEW = SpeedSettings(lengths=[16, 32], batches=[1, 2], steps=1, rounds=1, prefill=0)


@pytest.fixture(scope="module")
def folders(teacher_folder, tmp_path_factory):
    """A pure student and a hybrid of the tiny teacher, in folders."""
    teacher, made = AutoModelForCausalLM.from_pretrained(teacher_folder), {}
    for name, keep in (("pure", "none"), ("hybrid", [1])):
        made[name] = tmp_path_factory.mktemp("students") / name
        convert(teacher, "gated_deltanet", softmax_layers=keep).save_pretrained(made[name])
        AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(made[name])
    return {"teacher": teacher_folder, **made}


@pytest.fixture(scope="module")
def subjects(folders, teacher_folder):
    opener = SubjectLoader(str(teacher_folder))
    return [opener.load(str(folder)) for folder in folders.values()]


@pytest.fixture
def entries(subjects, tmp_path):
    """Each with an empty home."""
    return [
        replace(Candidate.from_subject(subject), output_dir=tmp_path / str(n)) for n, subject in enumerate(subjects)
    ]


@pytest.fixture(scope="module")
def raced(subjects, tmp_path_factory):
    """A finished race of teacher, pure student and hybrid, and what it found."""
    home = tmp_path_factory.mktemp("race")
    benchmark = SpeedBenchmark(
        [replace(Candidate.from_subject(s), output_dir=home / str(n)) for n, s in enumerate(subjects)], SMALL
    )
    assert [(e.length, e.batch) for e in benchmark.estimate()] == [(64, 1), (64, 2), (320, 1), (320, 2)]
    benchmark.check_memory(benchmark.estimate())
    return benchmark, benchmark.run()


def test_a_race(raced):
    benchmark, found = raced
    entries, found = benchmark.candidates, dict(zip(("teacher", "pure", "hybrid"), found))
    for one, entry in zip(found.values(), entries):
        assert Measurement.load(entry.output_dir / "speed.json") == one
        assert one.values["prefill_tokens_per_second@64x2"] == pytest.approx(
            1000 * 128 / one.values["first_token_milliseconds@64x2"]
        )
        assert "prefill_tokens_per_second@320x1" not in one.values  # longer than the prompts that were to be timed
        assert one.values["token_milliseconds@320x2"] > 0
        if one.details["points"][0]["prefill"]["extra_bytes"] is not None:
            assert one.values["peak_bytes@64x1"] >= one.values["weights_bytes"]
    caches = {
        name: [one.values[f"cache_bytes@{at}"] for at in ("64x1", "320x1", "320x2")] for name, one in found.items()
    }
    assert caches["teacher"][1:] == [5 * caches["teacher"][0], 10 * caches["teacher"][0]]
    assert caches["pure"][1:] == [caches["pure"][0], 2 * caches["pure"][0]]
    assert caches["pure"][1] < caches["hybrid"][1] < caches["teacher"][1]
    # the faster kind of cache is what counts; a state knows but one
    assert set(found["pure"].details["points"][0]["token"]) == {"growing"}
    for name in ("teacher", "hybrid"):
        both = [found[name].values[f"token_milliseconds_{kind}_cache@320x1"] for kind in ("growing", "static")]
        assert found[name].values["token_milliseconds@320x1"] == min(both)
    assert found["teacher"].details["break_even"] == {}
    assert set(found["pure"].details["break_even"][entries[0].name]) == {"1", "2"}


def test_estimates_of_memory_are_what_caches_take(raced):
    benchmark, found = raced
    for entry, one in zip(benchmark.candidates, found):
        for point in one.details["points"]:
            held = point["token"]["growing"]["cache_bytes"]
            assert entry.estimate_cache_bytes(point["length"], point["batch"]) == pytest.approx(held)


@pytest.mark.slow
def test_an_interrupted_race_goes_on(entries, monkeypatch):
    entries, whole = entries[:2], timing.time_decoding
    calls = []

    def until_third(*args, **kwargs):
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(speed, "time_decoding", until_third)
    with pytest.raises(KeyboardInterrupt):
        SpeedBenchmark(entries, FEW).run()
    monkeypatch.setattr(speed, "time_decoding", whole)
    later = SpeedBenchmark(entries, FEW)
    assert set(later.points) == {(16, 1), (16, 2)}
    assert [(e.length, e.batch) for e in later.estimate()] == [(32, 1), (32, 2)]
    found = later.run()
    again = SpeedBenchmark(entries, FEW)
    assert again.estimate() == []
    assert [one.values for one in again.run()] == [one.values for one in found]
    # another race, and the same one asked for anew, begin from nothing
    assert SpeedBenchmark(entries[:1], FEW).points == {}
    assert SpeedBenchmark(entries, FEW.model_copy(update={"steps": 5})).points == {}
    assert SpeedBenchmark(entries, FEW, ignore_cache=True).points == {}
    # half a cell is none
    (entries[0].output_dir / "speed.json").unlink()
    assert SpeedBenchmark(entries, FEW).points == {}


def test_what_does_not_fit_is_refused_with_what_fits(entries, monkeypatch):
    benchmark = SpeedBenchmark(entries, SpeedSettings(lengths=[100_000], steps=2))
    estimate = benchmark.estimate()[0]
    monkeypatch.setattr(speed, "get_free_memory", lambda device: int(estimate.bytes / 2))
    with pytest.raises(LimbeckError, match="100,000 tokens at batch size 1 need") as error:
        benchmark.check_memory([estimate])
    fits = int(error.value.hint.removeprefix("--lengths "))
    assert 40_000 < fits < 60_000
    assert SpeedBenchmark(entries, SpeedSettings(lengths=[fits], steps=2)).estimate()[0].bytes <= estimate.bytes / 2
    monkeypatch.setattr(speed, "get_free_memory", lambda device: None)
    benchmark.check_memory([estimate])


def test_learnt_positions_have_an_end():
    """gpt2 has a table of positions, llama computes them."""
    entries = [Candidate(family, Path("."), make_tiny_model(family).eval(), None) for family in ("gpt2", "llama")]
    assert entries[1].max_positions is None
    most = entries[0].max_positions
    assert most == entries[0].model.config.n_positions
    with pytest.raises(LimbeckError, match="learned position embeddings"):
        SpeedBenchmark(entries[:1], SpeedSettings(lengths=[most]), save_results=False)


def test_a_busy_machine_is_told(entries, monkeypatch):
    times = iter([1.0, 1.0, 2.0, 1.0])
    monkeypatch.setattr(speed, "time_reference_matmul", lambda device: next(times))
    benchmark = SpeedBenchmark(entries[:1], FEW)
    found = benchmark.run()
    assert any("took 1.0 ms at first and 2.0 ms later" in note for note in benchmark.notes)
    assert found[0].details["notes"] == benchmark.notes
    monkeypatch.setattr(system.os, "getloadavg", lambda: (63.0, 0.0, 0.0))
    assert "load 63.0" in system.describe_cpu_contention(1)
    monkeypatch.setattr(system.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert system.describe_cpu_contention(1) is None


def test_peaks():
    device, size = torch.device("cpu"), 64 << 20
    if system.measure_peak_memory(lambda: None, device) is None:
        pytest.skip("this system does not count")
    # touched and dropped again: the peak is what counts, and an earlier one does not
    assert system.measure_peak_memory(lambda: torch.ones(4 * size, dtype=torch.uint8), device) > 3.9 * size
    assert 0.9 * size < system.measure_peak_memory(lambda: torch.ones(size, dtype=torch.uint8), device) < 1.5 * size
    assert system.get_free_memory(device) > size


def test_int8_entries(entries):
    dynamic = entries[0].to_int8()
    assert dynamic.name == f"{entries[0].name}, int8, activations too"
    assert dynamic.output_dir != entries[0].output_dir
    found = SpeedBenchmark([entries[0], dynamic], FEW.model_copy(update={"lengths": [16], "batches": [1]})).run()
    assert found[1].values["weights_bytes"] < found[0].values["weights_bytes"]
    assert found[1].provenance.dtype == "int8, activations too"
    assert (dynamic.output_dir / "speed.json").is_file()


def test_as_one_measure_among_others(subjects, tmp_path):
    subject = replace(subjects[1], output_dir=tmp_path)
    given = FEW.model_dump() | {"batches": [1]}
    found = measures.run_measure(measures.get_measure("speed"), subject, given)
    assert found.model == subject.name
    assert found.details["entries"] == [subject.name, subject.teacher_or_none.name]
    assert measures.run_measure(measures.get_measure("speed"), subject, given) == found  # from its file


def test_break_even_lengths():
    def point(length, batch, milliseconds, size):
        return {
            "length": length,
            "batch": batch,
            "token": {"growing": {"milliseconds": milliseconds, "cache_bytes": size}},
        }

    mine = [point(200, 1, 2.0, 10), point(100, 1, 2.0, 10), point(100, 4, 2.0, 10)]
    theirs = [point(100, 1, 1.0, 20), point(200, 1, 3.0, 40), point(100, 4, 1.0, 20)]
    theirs[1]["token"]["static"] = {"milliseconds": 2.5, "cache_bytes": 40}
    found = find_break_evens(mine, {"teacher": theirs})["teacher"]
    assert found == {"1": {"time": pytest.approx(100 + 100 * 1 / 1.5), "memory": 100}}


def measurement(model, measure, values, teacher="teacher", details=None):
    made = Provenance(
        command="",
        date="2026-01-01T00:00:00Z",
        seconds=0,
        seed=0,
        dtype="float32",
        weights="",
        versions={},
        platform="",
        device="cpu",
        threads=1,
    )
    return Measurement(
        measure=measure,
        model=model,
        teacher=teacher,
        settings={},
        data={},
        values=values,
        details=details or {},
        provenance=made,
    )


def race_of(model, milliseconds, size):
    token = {"milliseconds": milliseconds, "least": milliseconds, "most": milliseconds, "cache_bytes": size}
    points = [{"length": n, "batch": 1, "token": {"growing": token}} for n in (1024, 4096)]
    return measurement(model, "speed", {"weights_bytes": 1e6}, details={"points": points, "break_even": {}})


def test_accuracy_against_speed(tmp_path):
    found = [
        measurement("student", "agreement", {"perplexity": 30.0, "teacher_perplexity": 17.0}),
        race_of("student", 5.0, 4e6),
    ]
    assert not figures.can_draw_tradeoff(found)
    found.append(race_of("teacher", 9.0, 2e8))
    assert figures.can_draw_tradeoff(found)
    paths = comparison.write_comparison(found, tmp_path)
    text = (tmp_path / "tradeoff.svg").read_text(encoding="utf-8")
    assert "next token after 4,096 tokens of context, ms" in text
    assert all(name in text for name in ("student", "4 MB", "teacher", "200 MB"))
    assert {path.name for path in paths} >= {"tradeoff.png", "speed.svg", "speed.png", "table.md", "values.csv"}
    with pytest.raises(LimbeckError, match="at 77 tokens"):
        figures.draw_tradeoff(found, length=77)


def test_the_verb(folders, teacher_folder, tmp_path, monkeypatch):
    def bench(*more):
        where = ("--teacher", str(teacher_folder), "--out", str(tmp_path / "out"), "--steps", "2", "--rounds", "1")
        return CliRunner().invoke(app, ["bench", str(folders["pure"]), *where, "--lengths", "16,32", *more])

    planned = bench("--plan")
    assert planned.exit_code == 0, planned.output
    assert not list(tmp_path.rglob("speed.json"))
    done = bench("--int8", "none")
    assert done.exit_code == 0, done.output
    assert re.search(r"decoding is (not )?faster", done.stdout)
    assert len(list((tmp_path / "out").rglob("speed.json"))) == 2
    assert (tmp_path / "out" / "speed.png").is_file()
    began = time.monotonic()
    assert "2 cached" in bench("--int8", "none").output
    assert time.monotonic() - began < 10
    for wrong, says in (
        (("--lengths", "1,x"), "--lengths 1,x"),
        (("--lengths", "0"), "speed: lengths"),
        (("--batch-sizes", ""), "--batch-sizes "),
        (("--teacher-int8", "4"), "--teacher-int8 4"),
        (("--threads", "0"), "--threads 0"),
    ):
        result = bench(*wrong)
        assert isinstance(result.exception, LimbeckError), wrong
        assert says in str(result.exception)
    with pytest.raises(LimbeckError, match="no model to benchmark"):
        CliRunner().invoke(app, ["bench"], catch_exceptions=False)


def test_on_the_screen(raced):
    _, found = raced
    shown = figures.build_speed_table(found)
    assert shown.row_count == 3 * 4
    assert len(figures.format_break_even(found)) == 2 * 2
    json.dumps([one.details for one in found])
