"""Build the page of results: tables, figures and sentences from the studies whose numbers lie beside this file.

    python docs/project/results/build.py                                  # writes README.md's generated parts, figures/
    python docs/project/results/build.py --add runs/real-teacher-cpu --name real-teacher       # takes a study in first
    python docs/project/results/build.py --more runs/seeds --name real-teacher     # its arms run elsewhere
    python docs/project/results/build.py --check                          # exit code 1 if README.md is not current

A study is a folder with a `study.json` as `limbeck study` writes it, without what no page shows: numbers have six
digits, an arm is a line. `limbeck report docs/project/results/NAME` makes a study's own page of it. A generated part of
README.md stands between `<!-- generated: NAME -->` and `<!-- end -->`; the rest is written by hand.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from limbeck.core.console import format_bytes
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import BUILT_IN, Recipe
from limbeck.report.collection import TEACHER, Run, RunCollection, load_collection
from limbeck.report.figures.panels import order_for_colors
from limbeck.report.figures.students import (
    EXAM_PERPLEXITY,
    add_legend,
    draw_exam_over_state,
    draw_orders,
    draw_repeat_by_distance,
    list_distances,
    rank_by_exam,
    read_state_bytes,
)
from limbeck.report.figures.style import create_figure, save_figure, use_style
from limbeck.report.privacy import strip_local_paths
from limbeck.report.tables import SeedGroup, group_seeds
from limbeck.report.text_tables import format_markdown_table
from limbeck.report.values import format_value
from limbeck.study.claims import CONTROLS, evaluate_claims
from limbeck.study.statistics import MIN_RANKED, RankCorrelation, correlate_ranks

HERE = Path(__file__).parent
REAL = "real-teacher"
# studies of small teachers that an order is read from, and under which condition
ORDERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("small-teacher", {}),
    ("experiment-1", {"stages": "2+3", "copy_projections": "yes"}),
    ("long-context", {}),
    ("tiny-teacher", {}),
)
# the first of these that a study has is what it orders students by
LOSSES = (EXAM_PERPLEXITY, "agreement.perplexity", "held_out.student_perplexity")
UNUSED = re.compile(
    r"held_out\.(targets|sequences|length|reverse_kl|top5_.*)|exam\.(documents|repeat_tokens)|window\.(sinks|length)"
    r"|parameters\.(added|copied|fresh)|agreement\.(window_)?(reverse_kl|top5_.*)|stages\.\w+\.first_loss|memory\.length"
)
ENVIRONMENT = ("limbeck", "python", "torch", "transformers", "threads", "gpu", "opened")
DIFFERENCE = "exam.window_loss_difference"
VERDICTS = ("holds", "does not hold", "undecided")
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)
NOT_RUN = (
    "*Not measured yet.* `limbeck study real-teacher` runs the study, and\n"
    "`python docs/project/results/build.py --add runs/real-teacher-cpu --name real-teacher` puts its numbers here."
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, metavar="FOLDER", help="of a study, whose numbers are taken in first")
    parser.add_argument("--more", type=Path, metavar="FOLDER", help="further arms of the study NAME, run elsewhere")
    parser.add_argument("--name", help="of the study here, e.g. real-teacher; that of its folder by default")
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(arguments)
    if args.add:
        add_study(args.add, HERE / (args.name or args.add.resolve().name))
    if args.more:
        add_arms(args.more, HERE / (args.name or args.more.resolve().name))
    current = write_page(HERE, check=args.check)
    if args.check and not current:
        print("README.md is not current; run: python docs/project/results/build.py", file=sys.stderr)
    return int(args.check and not current)


# ------------------------------------------------------------------ studies


def add_study(source: Path, target: Path) -> None:
    """Write a study's numbers into a folder of this page; LimbeckError if nothing in it is finished."""
    load_collection([source])
    content = json.loads((source / "study.json").read_text(encoding="utf-8"))
    target.mkdir(parents=True, exist_ok=True)
    (target / "study.json").write_text(format_study(shrink_study(content)), encoding="utf-8")


def add_arms(source: Path, target: Path) -> None:
    """Add arms of the same study that were run in another folder, and judge its claims again.

    Raises:
        LimbeckError: the studies have other settings than their grids apart.
    """
    path = target / "study.json"
    here, there = (json.loads(one.read_text(encoding="utf-8")) for one in (path, source / "study.json"))
    there = shrink_study(there)
    for key in ("base", "measures"):
        if here["study"][key] != there["study"][key]:
            raise LimbeckError(f"{key} of {source} are others than those of {target.name}", expected="the same study")
    arms = {arm["name"]: arm for arm in [*here["arms"], *there["arms"]] if arm["status"] == "finished"}
    for arm in here["arms"]:
        arms.setdefault(arm["name"], arm)
    grid = here["study"]["grid"]
    for axis in ("students", "recipes", "seeds"):
        grid[axis] = [*grid.get(axis, []), *(x for x in there["study"]["grid"].get(axis, []) if x not in grid[axis])]
    here["arms"] = list(arms.values())
    here["sharing"] = {key: sum(arm[key] or 0 for arm in here["arms"]) for key in here["sharing"]}
    teacher = next(iter(here["teachers"].values()))
    rows = [
        {**arm, "mixer": _find_mixer(arm["axes"]["student"]), "teacher": teacher["values"] if teacher else {}}
        for arm in here["arms"]
        if arm["status"] == "finished"
    ]
    here["claims"] = evaluate_claims(here["study"]["claims"], rows)
    path.write_text(format_study(_round(here)), encoding="utf-8")


def _find_mixer(student: str) -> str:
    """Return the mixer of a student by the name of its recipe, if it is one."""
    return Recipe.load(student).student.mixer if (BUILT_IN / f"{student}.yaml").exists() else student


def shrink_study(content: dict[str, Any]) -> dict[str, Any]:
    """Leave out what no page shows, local paths and the traces of errors; round to six digits."""
    arms = [
        {
            **arm,
            "values": _shrink_values(arm["values"]),
            "errors": _shrink_values(arm["errors"]),
            "failure": arm["failure"] and arm["failure"].partition("\n")[0],
            "stages": [
                {key: stage[key] for key in ("stage", "tokens", "seconds", "guard") if key in stage}
                for stage in arm["stages"] or []
            ],
        }
        for arm in content["arms"]
    ]
    environment = {key: value for key, value in content["environment"].items() if key in ENVIRONMENT}
    return _round(strip_local_paths({**content, "environment": environment, "arms": arms}))


def format_study(content: dict[str, Any]) -> str:
    """Format a study as JSON with a line for each arm and each claim."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list):
            lines = ",\n".join(f"  {json.dumps(one, ensure_ascii=False)}" for one in value)
            parts.append(f" {json.dumps(key)}: [\n{lines}\n ]" if value else f" {json.dumps(key)}: []")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _shrink_values(values: dict[str, float] | None) -> dict[str, float] | None:
    return values and {name: value for name, value in values.items() if not UNUSED.fullmatch(name)}


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _round(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_round(part) for part in value]
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.6g}")
    return value


def load_study(root: Path, name: str) -> tuple[RunCollection, list[SeedGroup]] | None:
    """Load a study of the page, and its runs by student and condition; None where it is not there."""
    if not (root / name / "study.json").is_file():
        return None
    collection = load_collection([root / name])
    return collection, group_seeds(collection)


def list_studies(root: Path) -> list[str]:
    """List the studies of the page, those of a real teacher first."""
    names = sorted(path.parent.name for path in root.glob("*/study.json"))
    return sorted(names, key=lambda name: not name.startswith("real"))


# ------------------------------------------------------------------ the page


def write_page(root: Path, check: bool = False) -> bool:
    """Write the generated parts of README.md and the figures; returns whether the parts were current.

    Args:
        check: change no file.
    """
    page = root / "README.md"
    text = page.read_text(encoding="utf-8")
    new = PART.sub(lambda part: f"{part[1]}\n{PARTS[part[2]](root).strip()}\n\n{part[3]}", text)
    if not check:
        draw_figures(root)
        page.write_text(new, encoding="utf-8")
    return new == text


def render_students(root: Path) -> str:
    """Render the table of the real teacher's students, and what it says."""
    found = load_study(root, REAL)
    if found is None:
        return NOT_RUN
    collection, groups = found
    ranked = rank_by_exam(groups)
    runs = [run for group in ranked for run in group.runs]
    distances = list_distances(ranked[0])
    tasks = sorted({name for run in runs for name in run.values if re.fullmatch(r"tasks\.\w+ acc(uracy)?", name)})
    heads = [
        "student",
        "seeds",
        "state",
        "tokens",
        "perplexity, first 512",
        "perplexity",
        "its window",
        "difference, nats",
    ]
    heads += [f"repeat, {at:,}" for at in distances] + [name.partition(".")[2] for name in tasks] + ["minutes"]
    growth = fmean(run.values["memory.teacher_bytes_per_token"] for run in runs)
    several = len(collection.seeds) > 1
    row = ["teacher", "", f"grows, {format_bytes(growth)} a token", ""]
    row += [_format_mean(f"exam.teacher_{name}", runs) for name in ("perplexity@512", "perplexity")] + ["", ""]
    row += [_format_mean(f"exam.teacher_repeat_loss@{at}", runs) for at in distances]
    row += [_format_mean(name, [run for run in collection.runs if run.student == TEACHER]) for name in tasks] + [""]
    rows = [row]
    names = ["exam.student_perplexity@512", EXAM_PERPLEXITY, "exam.window_perplexity", DIFFERENCE]
    names += [f"exam.student_repeat_loss@{at}" for at in distances] + tasks
    for group in ranked:
        tokens, minutes = (fmean(numbers) for numbers in zip(*((r.tokens, (r.seconds or 0) / 60) for r in group.runs)))
        seeds = str(len(group.runs)) if several else ""
        row = [group.student, seeds, format_bytes(read_state_bytes(group)), f"{tokens:,.0f}"]
        rows.append([*row, *(_format_mean(name, group.runs) for name in names), f"{minutes:.0f}"])
    sentences = [_describe_seeds(collection)]
    sentences += [_describe_differences(ranked)]
    left = {run.student for run in collection.runs} - {group.student for group in ranked} - {TEACHER}
    sentences += [f"Without a row, because it diverged or is not finished: {', '.join(sorted(left))}."] if left else []
    measured = [index for index, cells in enumerate(zip(*rows)) if any(cells)]
    table = format_markdown_table([heads[i] for i in measured], [[row[i] for i in measured] for row in rows])
    return f"{table}\n{' '.join(sentences)}"


def render_figures(root: Path) -> str:
    """Render the first two figures."""
    found = load_study(root, REAL)
    if found is None:
        return ""
    text = """![Perplexity of the exam over the bytes of a student's state](figures/exam.svg)

*Figure 1. The exam over memory. Bars: standard error over documents. Dashed: the teacher with a window of so many
bytes, which nobody trained. Black: the teacher.*
"""
    if not any(list_distances(group) for group in found[1]):
        return text
    return f"""{text}
![Loss on a passage that comes again, by distance](figures/repeat.svg)

*Figure 2. A passage that comes again. Who remembers it pays what the teacher pays.*
"""


def render_order(root: Path) -> str:
    """Render the correlation of the orders of students on the real teacher and on the small one."""
    real = load_study(root, REAL)
    if real is None:
        return NOT_RUN
    rows = []
    for name, condition in ORDERS:
        correlation, study = correlate_with_real(root, name, condition), load_study(root, name)
        if correlation is not None and study is not None:
            few = "none: too few students" if len(correlation.names) < MIN_RANKED else "none: equal or opposite"
            interval = few if correlation.low is None else f"{correlation.low:.2f} to {correlation.high:.2f}"
            p = "" if correlation.p is None else f"{correlation.p:.2g}"
            counts = [str(len(study[0].seeds)), str(len(correlation.names))]
            rows.append([f"[{name}]({name}/study.json)", *counts, f"{correlation.rho:.2f}", interval, p])
    if not rows:
        return "*No study of the small teacher shares three students with the real one.*"
    heads = ["order on the small teacher", "its seeds", "students in both", "Spearman's ρ", "95 % interval", "p"]
    return f"""{format_markdown_table(heads, rows)}
{_describe_trust(real[0])} The interval is over students: it says how the order of other students could differ, not how
another seed could.

![The order of students on both teachers](figures/orders.svg)

*Figure 3. The order of students, the best on top, on the small teacher and on the real one.*
"""


def render_claims(root: Path) -> str:
    """Render the verdicts of all studies by statement: those that hold somewhere first, undecided ones last."""
    by_statement: dict[tuple[str, str], list[list[str]]] = {}
    for name in list_studies(root):
        study = load_study(root, name)
        for claim in study[0].claims if study else []:
            row = [f"[{name}]({name}/study.json)", *_describe_claim(claim)]
            by_statement.setdefault((claim["statement"], claim["source"]), []).append(row)
    ranked = sorted(by_statement.items(), key=lambda item: min(VERDICTS.index(row[1].split(",")[0]) for row in item[1]))
    rows = [
        [f"{statement} ({source})" if number == 0 else "", *row]
        for (statement, source), found in ranked
        for number, row in enumerate(found)
    ]
    return format_markdown_table(["statement", "study", "verdict", "effect", "95 % interval"], rows, 3)


def render_cost(root: Path) -> str:
    """Render what each study cost."""
    rows = []
    for name in list_studies(root):
        study = load_study(root, name)
        if study is None or study[0].study is None:
            continue
        collection, settings = study[0], study[0].study
        runs = [run for run in collection.runs if run.student != TEACHER]
        command = f"`limbeck study {settings['name']} --size {settings.get('size')}`"
        seconds, saved = (f"{collection.sharing[key] / 60:.1f}" for key in ("seconds", "saved_seconds"))
        counts = [len(runs), len(collection.seeds), sum(run.status != "finished" for run in runs)]
        rows.append([name, command, *map(str, counts), f"{sum(run.tokens for run in runs):,}", seconds, saved])
    heads = ["study", "command", "arms", "seeds", "failed or open", "tokens", "minutes of training", "saved by sharing"]
    return format_markdown_table(heads, rows, 2)


PARTS = {
    "students": render_students,
    "figures": render_figures,
    "order": render_order,
    "claims": render_claims,
    "cost": render_cost,
}


def correlate_with_real(root: Path, name: str, condition: dict[str, str]) -> RankCorrelation | None:
    """Correlate the order of students in a study of the small teacher with that on the real one; None without both."""
    orders = read_orders(root, name, condition)
    return orders and correlate_ranks(*orders)


def read_orders(root: Path, name: str, condition: dict[str, str]) -> tuple[dict[str, float], dict[str, float]] | None:
    """Read the perplexity of each student in a study and on the real teacher, without control arms."""
    sides = []
    for study, at in ((name, condition), (REAL, {})):
        found = load_study(root, study)
        if found is None:
            return None
        groups = [one for one in found[1] if one.student not in (*CONTROLS, TEACHER)]
        groups = [one for one in groups if at.items() <= one.condition.items()]
        chosen = next((loss for loss in LOSSES if any(one.mean(loss) is not None for one in groups)), None)
        means = {one.student: one.mean(chosen) for one in groups} if chosen else {}
        sides.append({student: mean for student, mean in means.items() if mean is not None})
    return sides[0], sides[1]


def draw_figures(root: Path) -> None:
    """Draw the figures of the page into its folder `figures`."""
    real = load_study(root, REAL)
    if real is None:
        return
    collection, groups = real
    with use_style(order_for_colors(collection.students)):
        for name, draw in (("exam", draw_exam_over_state), ("repeat", draw_repeat_by_distance)):
            figure = create_figure(7.2, 3.8)
            if drawn := draw(figure.subplots(), groups):
                add_legend(figure, drawn)
                save_figure(figure, root / "figures" / f"{name}.svg")
        correlations = {name: correlate_with_real(root, name, condition) for name, condition in ORDERS}
        # the one with the most students in common is drawn
        for name, found in sorted(correlations.items(), key=lambda item: -len(item[1].names) if item[1] else 0):
            orders = read_orders(root, name, dict(ORDERS)[name])
            if orders and found:
                ranked = [sorted(found.names, key=lambda student, side=side: side[student]) for side in orders]
                figure = create_figure(5.6, 0.6 + 0.3 * len(found.names))
                draw_orders(figure.subplots(), (f"small teacher\n({name})", "real teacher"), (ranked[0], ranked[1]))
                save_figure(figure, root / "figures" / "orders.svg")
                break


# ------------------------------------------------------------------ cells and sentences


def _format_mean(name: str, runs: list[Run]) -> str:
    """Format a mean with the standard deviation over seeds; without seeds, the standard error over documents."""
    runs = [run for run in runs if name in run.values]
    if not runs:
        return ""
    numbers = [run.values[name] for run in runs]
    # a teacher and its windows have no seed: all runs repeat one number
    same = math.isclose(min(numbers), max(numbers), rel_tol=1e-4)
    error = _get_error(runs[0], name) if same else stdev(numbers)
    # a task's metric is the last word of its name, and says the unit
    return format_value(name.rpartition(" ")[2], fmean(numbers), error)


def _get_error(run: Run, name: str) -> float | None:
    return run.errors.get(name, run.values.get(f"{name}_standard_error"))


def _describe_differences(groups: list[SeedGroup]) -> str:
    """Say which students differ from the untrained window of their memory by two standard errors.

    Of one seed they are over documents, of several over seeds.
    """
    sides: dict[str, list[str]] = {"better": [], "worse": [], "not told apart from it": []}
    for group in groups:
        differences = group.seed_values(DIFFERENCE)
        if not differences or group.student in CONTROLS:
            continue
        several = len(differences) > 1
        error = stdev(differences) / math.sqrt(len(differences)) if several else _get_error(group.runs[0], DIFFERENCE)
        if error is not None:
            mean = fmean(differences)
            side = "not told apart from it" if abs(mean) < 2 * error else "better" if mean < 0 else "worse"
            sides[side].append(group.student)
    found = [f"{side}: {', '.join(names)}" for side, names in sides.items() if names]
    return f"Beside the window, by two standard errors of the difference: {'; '.join(found)}." if found else ""


def _describe_seeds(collection: RunCollection) -> str:
    """Say what the numbers of a table are, and how far they can be trusted."""
    one = "the standard error over documents or questions"
    if len(collection.seeds) == 1:
        return f"{_describe_trust(collection)} ± is {one}."
    return (
        f"{_describe_trust(collection)} ± is the standard deviation over seeds; for one seed, and for teacher and "
        f"windows, which have none, {one}."
    )


def _describe_trust(collection: RunCollection) -> str:
    """Say how many seeds an order rests on."""
    counts = Counter(run.student for run in collection.finished_runs if run.student != TEACHER)
    single = "neighbors in their order may be so by chance"
    if max(counts.values()) == 1:
        return f"**One seed** of the real teacher's students: {single}."
    if len(set(counts.values())) == 1:
        return f"The real teacher's students have {max(counts.values())} seeds."
    most = [name for name, count in counts.items() if count == max(counts.values())]
    least = "**one seed**" if min(counts.values()) == 1 else f"{min(counts.values())} or more"
    return f"{max(counts.values())} seeds of {', '.join(most)}; {least} of the others: {single}."


def _describe_claim(claim: dict[str, Any]) -> list[str]:
    """Describe a verdict: the verdict with its number of seeds, the effect with its unit, the interval."""
    findings = claim["findings"]
    seeds = max((len(one["by_seed"]) for one in findings), default=0)
    verdict = claim["verdict"] + (f", {seeds} seed{'s' * (seeds != 1)}" if seeds else ", not measured")
    if len(findings) > 1:
        held = sum(one["verdict"] == "holds" for one in findings)
        return [verdict, f"{held} of {len(findings)} parts hold" if seeds else "", ""]
    if not findings or findings[0]["effect"] is None:
        return [verdict, "", ""]
    one = findings[0]
    interval = "" if one["low"] is None else f"{one['low']:+.2g} to {one['high']:+.2g}"
    return [verdict, f"{one['effect']:+.2g} {claim['unit']}", interval]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LimbeckError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
