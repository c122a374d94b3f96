"""The report: what is on the page, in the files beside it, and what a browser makes of it."""

import csv
import html
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.core.errors import LimbeckError
from limbeck.evaluation.measure import Measurement
from limbeck.report.claims import build_claim_views
from limbeck.report.collection import TEACHER, load_collection
from limbeck.report.figures.over_length import build_length_panels
from limbeck.report.figures.panels import build_loss_panels, order_for_colors
from limbeck.report.figures.style import use_style
from limbeck.report.page import write_report
from limbeck.report.tables import build_headline_tables, build_measure_tables, describe_windows, group_seeds
from limbeck.study import Study, run_study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BAD = "<script>problems.push('escaped?')</script> & no luck"


@pytest.fixture(scope="module")
def real(tmp_path_factory, teacher_folder, corpus) -> Path:
    """A study of 2 students x 2 recipes x 2 seeds as `limbeck study` leaves it."""
    folder = tmp_path_factory.mktemp("studies") / "tiny"
    study = Study.parse(
        {
            "name": "tiny",
            "description": "Which is better?",
            "base": {
                "teacher": str(teacher_folder),
                "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
                "stages": [
                    {"stage": "hidden", "tokens": 256, "batch_size": 4},
                    {"stage": "logits", "tokens": 128, "batch_size": 2},
                ],
                "evaluation": {"tokens": 64, "prompt": None, "new_tokens": 0},
            },
            "grid": {"students": ["gla", "deltanet"], "stages": ["3", "2+3"], "seeds": [0, 1]},
            "measures": {"agreement": {"tokens": 64, "prefixes": 0}},
            "claims": ["memory-constant-in-length", "hidden-state-alignment-helps"],
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.mktemp("cache")))
        run_study(study, folder)
    return folder


@pytest.fixture(scope="module")
def full(real, tmp_path_factory) -> Path:
    """The same with an arm that failed, a claim with an interval, and measures over lengths."""
    folder = tmp_path_factory.mktemp("studies") / "full"
    shutil.copytree(real, folder)
    study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    for number, arm in enumerate(study["arms"]):
        for tokens in (512, 1024):
            arm["values"] |= {
                f"positions.perplexity, first {tokens} tokens": 20.0 + number,
                f"needle.niah 1, {tokens} tokens, among 10": 0.1 * number,
                f"speed.token_milliseconds@{tokens}x1": 5.0 + number,
            }
        arm["values"]["needle.chance among 10"] = 0.1
    study["arms"][1] |= {
        "status": "failed",
        "failure": f"{BAD}\nTraceback (most recent call last):\n  at /home/ann/x.py",
    }
    for key in ("values", "errors", "stages", "seconds"):
        study["arms"][1][key] = None
    study["claims"][0]["findings"][0] |= {"effect": 0.2, "low": 0.1, "high": 0.3, "p": 0.003, "margin": 0.05}
    (folder / "study.json").write_text(json.dumps(study), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def written(full) -> tuple[str, str]:
    """Its page and its Markdown."""
    page, markdown, _ = write_report([full])
    return page.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', page)


def test_a_study_becomes_a_page_with_files_beside_it(real, tmp_path, teacher_folder):
    page, markdown, files = write_report([real], tmp_path / "out" / "result.html")
    assert [path.name for path in (page, markdown, files)] == ["result.html", "result.md", "result_files"]
    text = page.read_text(encoding="utf-8")
    known = ["claims", "results", "loss", "speed", "analysis", "numbers", "provenance"]
    assert sections(text) == known, "no empty sections"
    assert "2 students of the teacher tiny-llama under 2 conditions (stages) with 2 seeds: 8 runs." in text
    assert "Which is better?" in text
    for private in (str(real), str(teacher_folder), str(tmp_path)):
        assert private not in text + markdown.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!#|data:)', text), "nothing is loaded"
    # the number of a table is the mean over seeds, and the file has both
    values = [one["values"] for one in json.loads((real / "study.json").read_text(encoding="utf-8"))["arms"][:2]]
    mean = statistics.fmean(one["agreement.perplexity"] for one in values)
    assert f"{mean:.2f}"[:4] in text
    rows = list(csv.DictReader((files / "values.csv").open()))
    mine = [float(row["value"]) for row in rows if row["name"] == "agreement.perplexity" and row["student"] == "gla"]
    assert mean == pytest.approx(statistics.fmean(mine[:2]))
    links = re.findall(r"\]\((result_files/[^)]+)\)", markdown.read_text(encoding="utf-8"))
    assert links
    assert all((page.parent / link).is_file() for link in links)
    assert "| gla | " in markdown.read_text(encoding="utf-8")


def test_ids_are_unique_and_all_links_lead_somewhere(written):
    text, _ = written
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)
    assert "currentColor" in text
    assert not re.search(r"stroke: #0072b2", text), "the colours are the page's"


def test_what_failed_is_told_and_escaped(written):
    text, markdown = written
    assert BAD not in text
    assert html.escape(BAD, quote=False).replace("'", "&#39;") in text
    assert "ann" not in text, "no traceback"
    assert "7 finished and 1 failed." in text
    assert "failed" in sections(text)
    assert "& no luck" in markdown
    assert {"length", "retrieval"} <= set(sections(text))


def test_tables_have_a_column_for_each_place_and_the_teacher_above(full):
    lines = group_seeds(load_collection([full]))
    perplexity = build_headline_tables(lines)[0]
    assert [column.text for column in perplexity.columns] == ["student", "stages 3", "stages 2+3"]
    window = "untrained window, 8 tokens"  # of both students, whose states are of one size
    assert [row.cells[0].text for row in perplexity.rows] == [TEACHER, window, "gla", "deltanet"]
    assert [row.pinned for row in perplexity.rows] == [True, True, False, False]
    for index in (1, 2):
        students = perplexity.rows[2:]
        (best,) = (row for row in students if row.cells[index].best)
        assert best.cells[index].sort_key == min(row.cells[index].sort_key for row in students)
    numbers = next(table for table in build_measure_tables(lines) if table.title.startswith("measure agreement"))
    assert [row.cells[2].text for row in numbers.rows] == ["1", "1", "2", "2", "2", ""]  # one seed failed; the window
    assert not any("window" in column.text for column in numbers.columns)
    cells = {row.cells[0].text: row.cells for row in perplexity.rows}
    said = " ".join(describe_windows(lines)).split("No better")  # the better ones come first
    for student in ("gla", "deltanet"):
        for index, stages in ((1, "3"), (2, "2+3")):
            is_better = cells[student][index].sort_key < cells[window][index].sort_key
            assert f"{student}, stages {stages}" in said[0 if is_better else -1]


def test_panels_of_one_stage_have_one_scale_and_say_what_they_show(full):
    collection = load_collection([full])
    with use_style(order_for_colors(collection.students)):
        curves, lengths = build_loss_panels(collection), build_length_panels(group_seeds(collection))
    assert [(panel.title, panel.axis_values["stages"]) for panel in curves] == [
        ("Stage 3: logits", "3"),
        ("Stage 3: logits", "2+3"),
        ("Stage 2: hidden states", "2+3"),
    ]
    limits = [panel.figure.axes[0].get_ylim() for panel in curves]
    assert limits[0] == limits[1]
    needle = next(panel for panel in lengths if panel.title.startswith("Needle"))
    assert needle.axis_values == {"stages": "3"}
    assert needle.caption == "At 1,024 from 0 (gla) to 0.45 (deltanet); chance is dotted."
    assert len({panel.name for panel in curves + lengths}) == len(curves + lengths), "each has a file of its own"


def test_runs_made_one_by_one(real, tmp_path):
    """Runs that differ by their seed alone are one line; a measurement of the teacher is one more."""
    runs = [real / f"{name}_2+3_seed{seed}" for name in ("gla", "deltanet") for seed in (0, 1)]
    one = Measurement.load(runs[0] / "eval" / "agreement.json")
    teacher = one.model_copy(update={"model": one.teacher, "values": {"perplexity": 3.25}, "errors": {}})
    teacher.save(tmp_path / "measured" / "teacher")
    collection = load_collection([*runs, tmp_path / "measured"])
    assert collection.students == ["gla_2+3_seed0", "deltanet_2+3_seed0"]
    assert [len(line.runs) for line in group_seeds(collection)] == [2, 2, 1]
    known = {
        arm["name"]: arm["values"] for arm in json.loads((real / "study.json").read_text(encoding="utf-8"))["arms"]
    }
    assert collection.runs[0].values == known["gla_2+3_seed0"], "as the study has them"
    page = write_report([*runs, tmp_path / "measured"], tmp_path / "compared.html")[0].read_text(encoding="utf-8")
    assert "3.25" in page
    assert "claims" not in sections(page)


def test_the_teachers_speed_comes_from_the_race_with_its_students(full, tmp_path):
    shutil.copytree(full, tmp_path / "full")
    folder = tmp_path / "full" / "gla_3_seed0" / "eval"
    one = Measurement.load(folder / "agreement.json")
    token = {"growing": {"milliseconds": 8.0, "cache_bytes": 1000}}
    points = [{"length": length, "batch": 1, "token": token} for length in (512, 1024)]
    one.model_copy(update={"measure": "speed", "values": {}, "details": {"rivals": {"t": points}}}).save(folder)
    collection = load_collection([tmp_path / "full"])
    (teacher,) = (arm for arm in collection.runs if arm.student == TEACHER)
    assert teacher.values["speed.token_milliseconds@512x1"] == 8.0
    assert teacher.values["agreement.kl"] == 0
    assert TEACHER not in collection.students
    with use_style(order_for_colors(collection.students)):
        times = [panel for panel in build_length_panels(group_seeds(collection)) if panel.title.startswith("Time")]
    assert all(TEACHER in panel.series_names for panel in times)


def test_strips_of_a_claim_share_a_scale():
    def part(**changes):
        usual = {"says": "", "kind": "more", "margin": 0.1, "verdict": "holds", "effect": 0.2, "low": 0.1, "high": 0.4}
        return usual | {"p": 1e-9, "by_seed": {"0": 0.2}, "consistent": 1, "comparisons": 1, "reason": ""} | changes

    claim = {"name": "", "statement": "", "source": "", "unit": "", "verdict": "holds"}
    claim["findings"] = [part(), part(effect=-0.4, low=None, high=None, p=None, by_seed={"0": -0.4})]
    one, other = build_claim_views([claim])[0].findings
    assert one.number_line.zero == other.number_line.zero == 50
    assert one.number_line.high == 96
    assert other.number_line.effect == 4
    assert (one.p, other.p, other.interval) == ("< 0.0001", "", "")
    assert other.effect == "−0.4"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda real, tmp: ([tmp / "none"], None), "is not a folder"),
        (lambda real, tmp: ([real, real], None), "cannot be combined"),
        (lambda real, tmp: ([real, real / "gla_3_seed0"], None), "cannot be combined"),
        (lambda real, tmp: ([tmp], None), "no measurements"),
        (lambda real, tmp: ([real], tmp / "page.pdf"), "ends in .html"),
    ],
)
def test_what_cannot_be_reported_is_said(real, tmp_path, change, says):
    with pytest.raises(LimbeckError, match=says):
        write_report(*change(real, tmp_path))


@pytest.mark.parametrize("name", ["pages", "deep/er"])
def test_a_folder_gets_a_page_in_it(real, tmp_path, name):
    page, *_ = write_report([real / "gla_3_seed0"], tmp_path / name)
    assert page == tmp_path / name / "report.html"
    assert page.is_file()
    assert write_report([real / "gla_3_seed0"], tmp_path / name)[0] == page, "a folder that is there too"


def test_another_format_and_missing_libraries_are_said(real, tmp_path, monkeypatch):
    (tmp_path / "study.json").write_text('{"format": 2}', encoding="utf-8")
    with pytest.raises(LimbeckError, match="format 1"):
        write_report([tmp_path])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(LimbeckError, match=r"limbeck\[report\]"):
        write_report([real])


def test_the_command(real, tmp_path):
    from limbeck.cli import report  # noqa: F401

    result = CliRunner().invoke(app, ["report", str(real / "gla_3_seed0"), "--out", str(tmp_path / "one.html")])
    assert result.exit_code == 0, result.output
    known = ["results", "loss", "speed", "analysis", "numbers", "provenance"]
    assert sections((tmp_path / "one.html").read_text(encoding="utf-8")) == known


# ---------------------------------------------------------------------- in a browser

WATCH = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(event.message ?? String(event)), true);
console.error = console.warn = (...words) => problems.push(words.join(" "));
</script>"""

ACT = """
const page = document.querySelector("iframe").contentDocument, view = page.defaultView, found = {};
const all = (selector, root = page) => [...root.querySelectorAll(selector)];
const shown = (element) => element.getClientRects().length > 0;
const names = (table) => all("tbody tr", table).filter(shown).map((row) => row.cells[0].textContent.trim());
const table = page.querySelector("#results table"), head = table.querySelectorAll("thead th")[1];
const press = (axis, value) =>
  all(`fieldset[data-axis="${axis}"] button`).find((button) => button.dataset.value === value).click();
const numbers = () => all("tbody tr:not(.fixed)", table).map((row) => Number(row.cells[1].dataset.sort));

const scrolls = (element) => element.closest(".box, pre, svg svg, figure svg > *");
found.width = [page.documentElement.clientWidth, page.documentElement.scrollWidth];
found.wide = all("body *").filter((one) => shown(one) && !scrolls(one) && one.getBoundingClientRect().right > 360.5)
  .map((one) => one.outerHTML.slice(0, 120));
found.before = names(table);
head.querySelector("button").click();
found.up = [head.getAttribute("aria-sort"), numbers(), names(table)[0]];
head.querySelector("button").click();
found.down = [head.getAttribute("aria-sort"), numbers(), names(table)[0]];
page.querySelector("#controls details").open = true;
press("student", "gla");
found.student = names(table);
found.lines = all("#loss figure svg [data-at]").filter(shown).map((line) => JSON.parse(line.dataset.at).student);
press("stages", "2+3");
found.columns = all("thead th", table).filter(shown).map((one) => one.textContent);
found.figures = all("#loss figure").filter(shown).length;
found.state = page.getElementById("state").textContent;
page.getElementById("reset").click();
found.after = names(table);
const search = page.getElementById("search");
search.value = "DELTA";
search.dispatchEvent(new view.Event("input"));
found.search = names(table);
page.getElementById("reset").click();
view.dispatchEvent(new view.Event("beforeprint"));
found.closed = all("main details:not([open])").length;
view.dispatchEvent(new view.Event("afterprint"));
found.open = all("main details[open]").length;
found.loaded = view.performance.getEntriesByType("resource").map((one) => one.name);
found.problems = view.problems;
document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
"""


def in_chromium(page: str, script: str, folder: Path) -> dict:
    """What a script finds on a page in a phone's frame of 360 px, without network."""
    framed = html.escape(page.replace("<head>", f"<head>{WATCH}", 1))
    file = folder / "frame.html"
    file.write_text(
        f'<!DOCTYPE html><meta charset="utf-8">'
        f'<iframe style="width:360px;height:3000px;border:0" srcdoc="{framed}"></iframe>'
        f'<script>addEventListener("load", () => {{ {script} }});</script>',
        encoding="utf-8",
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--no-first-run"]
    command = [str(CHROMIUM), *flags, *offline, "--dump-dom", f"file://{file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r"FOUND(\{.*\})END", done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    return json.loads(html.unescape(match[1]))


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_the_page_in_a_browser(written, tmp_path):
    found = in_chromium(written[0], ACT, tmp_path)
    assert found["problems"] == []
    assert found["loaded"] == []
    assert found["width"] == [360, 360]
    assert found["wide"] == []
    pinned = ["teacher", "untrained window, 8 tokens"]
    assert found["before"] == [*pinned, "gla", "deltanet"]
    order, numbers, first = found["up"]
    assert (order, first) == ("ascending", "teacher")
    assert numbers == sorted(numbers)
    order, numbers, first = found["down"]
    assert (order, first) == ("descending", "teacher")
    assert numbers == sorted(numbers, reverse=True)
    assert found["student"] == [*pinned, "gla"]
    assert set(found["lines"]) == {"gla"}
    assert [text.strip() for text in found["columns"]] == ["student", "stages 2+3"]
    assert found["figures"] == 2  # both stages of one recipe
    assert " rows" in found["state"]
    assert sorted(found["after"]) == sorted([*pinned, "gla", "deltanet"])
    assert found["search"] == [*pinned, "deltanet"]
    assert found["closed"] == 0
    assert found["open"] == 0
