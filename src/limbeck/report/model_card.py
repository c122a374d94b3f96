"""The model card: metadata that the hub reads, and what a reader should know before using the student.

    text = generate_model_card("owner/name", plan, teacher_info, run)

Every number comes from the run's own files. A student without a run gets a card without results.

The card's sections about a run: training, results, memory, sample text.

    text = "

".join(render_run_sections(PublishedRun(recipe, result, manifest)))

Every number is from the run's own files.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from limbeck.core.console import format_bytes, format_duration
from limbeck.core.errors import LimbeckError
from limbeck.core.version import __version__
from limbeck.data.hub import HUB_NAME_PATTERN
from limbeck.data.records import SUPPORTED_EXTENSIONS
from limbeck.mixers import registry
from limbeck.models import format_ranges
from limbeck.report.teacher_info import TeacherInfo
from limbeck.report.values import escape_markdown, format_code_span


@dataclass(frozen=True)
class PublishedRun:
    """A finished run as published: recipe, eval.json and manifest.json, local paths taken out."""

    recipe: dict[str, Any]
    result: dict[str, Any]
    manifest: dict[str, Any]


def render_run_sections(run: PublishedRun) -> list[str]:
    """Markdown, a section each; empty where the run has nothing to say."""
    return [_training(run), _results(run), _memory(run.result["memory"]), _sample(run.result)]


def _training(run: PublishedRun) -> str:
    data, stages = run.recipe["data"], run.result["stages"]
    if not stages:
        return ""
    lines = [
        "## Training",
        "",
        f"Text: {_text(data['source'])}, in packed sequences of {data['seq_len']} tokens. "
        f"Seed {run.result['seed']}, on {run.manifest.get('gpu') or 'CPU'}.",
        "",
        "| stage | learns | tokens | learning rate | loss at start | loss at end | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for settings, facts in zip(run.recipe["stages"], stages):
        learns = settings.get("train", "attention" if settings["stage"] != "calibrate" else "output projections")
        rate = f"{settings['lr']:g}" if "lr" in settings else "closed form"
        if "unexplained" in facts:
            losses = ["", f"{100 * facts['unexplained']:.1f} % unexplained"]
        else:
            losses = [f"{facts['first_loss']:.3f}", f"{facts['loss']:.3f}"]
        cells = [settings["stage"], learns, f"{facts['tokens']:,}", rate, *losses, format_duration(facts["seconds"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _results(run: PublishedRun) -> str:
    held, made = run.result["held_out"], run.manifest
    versions = ", ".join(f"{name} {made[name]}" for name in ("limbeck", "torch", "transformers", "python"))
    return "\n".join(
        [
            "## Results",
            "",
            f"Held-out part of the same text: {held['targets']:,} tokens in sequences of {held['length']}.",
            "",
            "| | teacher | student |",
            "|---|---|---|",
            f"| perplexity | {held['teacher_perplexity']:.2f} | {held['student_perplexity']:.2f} |",
            f"| same most likely token | | {100 * held['top1_agreement']:.1f} % |",
            f"| KL(teacher ‖ student), nats a token | | {held['kl']:.3f} |",
            "",
            "Measured at the end of `limbeck distill recipe.yaml` with the recipe below "
            f"({versions}). To measure again, in the run's directory: "
            f"`limbeck eval student --tokens {run.recipe['evaluation']['tokens']}`.",
        ]
    )


def _memory(memory: dict[str, Any]) -> str:
    lines = ["## Memory", "", "| cache of one sequence | teacher | student |", "|---|---|---|"]
    for tokens in (512, 32_768):
        teacher = tokens * memory["teacher_bytes_per_token"]
        student = memory["student_fixed_bytes"] + tokens * memory["student_bytes_per_token"]
        lines.append(f"| {tokens:,} tokens | {format_bytes(teacher)} | {format_bytes(student)} |")
    even = memory["break_even_tokens"]
    if even is None:
        said = "The student's cache grows as fast as the teacher's."
    elif memory["student_bytes_per_token"]:
        said = (
            f"The student's cache grows with length too, but slower; it is the smaller one from {even:.0f} tokens on."
        )
    else:
        said = f"The student's cache does not grow with length; it is the smaller one from {even:.0f} tokens on."
    return "\n".join([*lines, "", f"{said} Counted on real caches in float32."])


def _sample(result: dict[str, Any]) -> str:
    if not result["samples"]:
        return ""
    lines = ["## Sample", "", f"Greedy continuations of: *{escape_markdown(result['prompt'])}*", ""]
    lines += [f"- {name}: {escape_markdown(text)}" for name, text in result["samples"].items()]
    return "\n".join(lines)


def _text(source: str) -> str:
    if source == "embedded" or source.startswith("embedded:"):
        return f"{format_code_span(source)} (what comes with limbeck; its sources and licences are listed in `limbeck.data.offline.corpus`)"
    return format_code_span(source)


PAPER_ARXIV_ID = "2504.14366"
CITATION = """@misc{haller2025empirical,
  title         = {Empirical Evaluation of Knowledge Distillation from Transformers to Subquadratic Language Models},
  author        = {Patrick Haller and Jonas Golde and Alan Akbik},
  year          = {2025},
  eprint        = {2504.14366},
  archivePrefix = {arXiv}
}"""


def generate_model_card(
    repo_id: str, plan: dict[str, Any], teacher_info: TeacherInfo, run: PublishedRun | None = None
) -> str:
    """The whole README.md.

    Args:
        repo_id: the repository, `owner/name`.
        plan: the student's `config.limbeck`.
        teacher_info: what `resolve_teacher_info` knows of the teacher.

    Raises:
        LimbeckError: the metadata do not survive being read again.
    """
    parts = [_opening(repo_id, plan, teacher_info, run), _use(repo_id, plan), _layers(plan)]
    if run:
        parts += render_run_sections(run)
    parts += [_limits(teacher_info, run), _recipe(run), _citation(plan)]
    return assemble_model_card(
        build_card_metadata(plan, teacher_info, run), "\n\n".join(part for part in parts if part) + "\n"
    )


def build_card_metadata(
    plan: dict[str, Any], teacher_info: TeacherInfo, run: PublishedRun | None = None
) -> dict[str, Any]:
    """What stands at the card's head, in the hub's terms."""
    source = run.recipe["data"]["source"] if run else ""
    hub = HUB_NAME_PATTERN.fullmatch(source) if not source.lower().endswith(SUPPORTED_EXTENSIONS) else None
    facts: dict[str, Any] = {
        **teacher_info.license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["limbeck", "distillation", *_linear(plan), *_names(plan)])),
    }
    if teacher_info.languages:
        facts["language"] = teacher_info.languages
    if teacher_info.repo_id:
        facts["base_model"] = teacher_info.repo_id
    if hub:
        facts["datasets"] = [hub["name"]]
    return facts


def assemble_model_card(facts: dict[str, Any], body: str) -> str:
    """A card of metadata and body, read again by the hub's own library to see that both arrive."""
    from huggingface_hub import ModelCard, ModelCardData

    text = f"---\n{ModelCardData(**facts).to_yaml()}\n---\n\n{body}"
    if ModelCard(text).data.to_dict() != facts:
        raise LimbeckError("the card's metadata cannot be read again", expected=str(facts))
    return text


# ---------------------------------------------------------------------- sections


def _opening(repo_id: str, plan: dict[str, Any], teacher_info: TeacherInfo, run: PublishedRun | None) -> str:
    converted, total = len(plan["layers"]), _total(plan)
    names = " and ".join(f"`{name}`" for name in _names(plan))
    teacher = (
        f"[{teacher_info.display_name}](https://huggingface.co/{teacher_info.repo_id})"
        if teacher_info.repo_id
        else teacher_info.display_name
    )
    version = run.manifest.get("limbeck", __version__) if run else __version__
    lines = [
        f"# {repo_id.split('/')[-1]}",
        "",
        f"A causal language model made from {teacher} with limbeck {version}: softmax attention is replaced by {names} "
        f"in {converted} of {total} layers. All else is built as in the teacher, whose weights it started from.",
    ]
    if run is None:
        lines[-1] += " It comes from a conversion or without its run, so this card has no results."
    elif run.result["stages"]:
        tokens = sum(stage["tokens"] for stage in run.result["stages"])
        lines[-1] += f" It learnt from the teacher on {tokens:,} tokens."
    else:
        lines[-1] += " It was not trained."
    if run and not run.recipe["student"]["copy_projections"]:
        lines[-1] += " The projections of the replaced layers were drawn afresh."
    if teacher_info.weights_note:
        lines[-1] += f" {teacher_info.weights_note}"
    return "\n".join(lines)


def _use(repo_id: str, plan: dict[str, Any]) -> str:
    origins = plan.get("origins", {})
    needs = sorted({o["package"] for o in origins.values() if o.get("package")})
    files = [name for name, o in origins.items() if o.get("file")]
    lines = [
        "## Use",
        "",
        "```",
        " ".join(["pip install limbeck", *needs]),
        "```",
        "",
        "```python",
        "import limbeck  # makes the model type known to transformers",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")',
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}"{", trust_remote_code=True" if files else ""})',
        'ids = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))",
        "```",
        "",
    ]
    if files:
        which = " and ".join(f"`mixer_{name}.py`" for name in files)
        return "\n".join([*lines, f"`trust_remote_code=True` is needed: it executes {which} of this repository."])
    return "\n".join(
        [
            *lines,
            "Where limbeck is installed but not imported, `trust_remote_code=True` does the same:",
            "",
            "```python",
            f'model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)',
            "```",
        ]
    )


def _layers(plan: dict[str, Any]) -> str:
    groups: dict[tuple[str, str], list[int]] = {}
    for entry in plan["layers"]:
        options = ", ".join(f"{key}={_value(value)}" for key, value in entry["options"].items())
        groups.setdefault((entry["mixer"], options), []).append(entry["layer"])
    rows = [(layers, f"`{name}`", _summary(name), options) for (name, options), layers in groups.items()]
    kept = sorted(set(range(_total(plan))) - {entry["layer"] for entry in plan["layers"]})
    if kept:
        rows.append((kept, "softmax", "the teacher's own attention", ""))
    lines = ["## Layers", "", "| layers | mixer | what it is | options |", "|---|---|---|---|"]
    for layers, name, what, options in sorted(rows, key=lambda row: row[0][0]):
        lines.append(f"| {format_ranges(layers)} | {name} | {escape_markdown(what)} | {escape_markdown(options)} |")
    return "\n".join(lines)


def _limits(teacher_info: TeacherInfo, run: PublishedRun | None) -> str:
    points = []
    if run is None:
        points.append(
            "Nothing was measured here. If it was only converted, its text is not usable before distillation."
        )
    else:
        held, tokens = run.result["held_out"], sum(stage["tokens"] for stage in run.result["stages"])
        ratio = held["student_perplexity"] / held["teacher_perplexity"]
        points += [
            f"After {tokens:,} tokens its perplexity is {ratio:.2f} times the teacher's, and it prefers another next "
            f"token in {100 * (1 - held['top1_agreement']):.0f} % of places. "
            "Do not expect it to do what the teacher does.",
            f"The numbers come from one seed and {held['targets']:,} tokens of one kind of text in sequences of "
            f"{held['length']}. Longer contexts, other text, other languages and tasks were not measured.",
        ]
        if run.result["memory"]["break_even_tokens"] is not None:
            points.append("A smaller memory holds less: copying and looking up what stood far back is where such "
                          "students lose most. That was not measured either.")  # fmt: skip
    points += [
        f"It inherits what {teacher_info.display_name} learnt, its mistakes and biases included. Whether instruction following and "
        "refusals of the teacher survived was not tested.",
        "Its code is the package limbeck; with transformers alone it cannot be loaded.",
    ]
    return "\n".join(["## Limits", "", *(f"- {point}" for point in points)])


def _recipe(run: PublishedRun | None) -> str:
    if run is None:
        return ""
    text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True).rstrip()
    opening = ["<details>", "<summary>The complete recipe (recipe.yaml; local paths by name only)</summary>"]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # a prompt may hold backquotes
    return "\n".join(["## Recipe", "", *opening, "", f"{fence}yaml", text, fence, "", "</details>"])


def _citation(plan: dict[str, Any]) -> str:
    lines = [
        "## Citation",
        "",
        f"The procedure follows [arXiv {PAPER_ARXIV_ID}](https://arxiv.org/abs/{PAPER_ARXIV_ID}):",
        "",
        "```bibtex",
        CITATION,
        "```",
    ]
    inner = {str(e["options"]["linear"]) for e in plan["layers"] if e["mixer"] == "hybrid" and "linear" in e["options"]}
    for name in [*_names(plan), *sorted(inner - set(_names(plan)))]:
        source = registry.get(name).source if registry.is_registered(name) else ""
        if source:
            lines += ["", f"Please cite the mixer `{name}` too: {_linked(source)}."]
    return "\n".join(lines)


# ---------------------------------------------------------------------- words


def _names(plan: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(entry["mixer"] for entry in plan["layers"]))


def _linear(plan: dict[str, Any]) -> list[str]:
    """The tag of models in which no layer looks at all tokens before."""
    mixers = [registry.get(name) for name in _names(plan) if registry.is_registered(name)]
    grows = len(plan["layers"]) < _total(plan) or any(mixer.has_growing_state for mixer in mixers)
    return [] if grows else ["subquadratic"]


def _total(plan: dict[str, Any]) -> int:
    """Layers with attention in the model; the shapes know, the converted ones are the least that there are."""
    numbers = [entry["layer"] + 1 for entry in plan["layers"]]
    return max([shape.get("layers", 1) for shape in plan["shapes"]] + numbers)


def _summary(name: str) -> str:
    return registry.get(name).summary if registry.is_registered(name) else "a mixer of its authors' own, see its file"


def _linked(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
