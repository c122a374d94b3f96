"""The model card: metadata that the Hugging Face Hub reads, and what a reader should know before using the student.

    text = generate_model_card("owner/name", config["limbeck"], teacher_info, run)

Every number comes from the run's own files. A student without a run gets a card without results.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from limbeck.core.console import format_duration
from limbeck.core.errors import LimbeckError
from limbeck.core.repeated_text import REPEATED_TEXT_PREFIX
from limbeck.core.version import __version__
from limbeck.data.hub import HUB_NAME_PATTERN
from limbeck.data.records import SUPPORTED_EXTENSIONS
from limbeck.mixers import registry
from limbeck.models import format_ranges
from limbeck.models.export.record import ExportRecord
from limbeck.models.head_groups import describe_softmax_heads
from limbeck.models.layers import SPLIT_MIXER, name_base_mixer
from limbeck.report.engines import describe_engines
from limbeck.report.run_summary import (
    describe_break_even,
    describe_exam,
    describe_window,
    format_result_table,
    format_samples,
    list_guard_losses,
    list_memory_rows,
    list_quality_rows,
)
from limbeck.report.teacher_info import TeacherInfo
from limbeck.report.text_tables import escape_markdown, format_code_span, format_markdown_table

PAPER_ARXIV_ID = "2504.14366"
CITATION = """@misc{haller2025empirical,
  title         = {Empirical Evaluation of Knowledge Distillation from Transformers to Subquadratic Language Models},
  author        = {Patrick Haller and Jonas Golde and Alan Akbik},
  year          = {2025},
  eprint        = {2504.14366},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True)
class PublishedRun:
    """A finished run as published: recipe, eval.json and manifest.json, local paths taken out."""

    recipe: dict[str, Any]
    result: dict[str, Any]
    manifest: dict[str, Any]


def generate_model_card(
    repo_id: str,
    plan: dict[str, Any],
    teacher_info: TeacherInfo,
    run: PublishedRun | None = None,
    exports: Sequence[tuple[str, ExportRecord]] = (),
) -> str:
    """Write the whole README.md.

    Args:
        repo_id: the repository, `owner/name`.
        plan: the student's `config.limbeck`.
        teacher_info: what `limbeck.report.teacher_info.resolve_teacher_info` returns.
        exports: folders in the repository and records of what is sent along for other engines.

    Raises:
        LimbeckError: the metadata cannot be read back.
    """
    parts = [_opening(repo_id, plan, teacher_info, run), _use(repo_id, plan), describe_engines(repo_id, exports)]
    parts.append(_layers(plan))
    if run:
        parts += [_training(run), _results(run), _memory(run), _sample(run)]
    parts += [_limits(teacher_info, run, exports), _recipe(run), _citation(plan)]
    return assemble_model_card(
        build_card_metadata(plan, teacher_info, run), "\n\n".join(part for part in parts if part) + "\n"
    )


def build_card_metadata(
    plan: dict[str, Any], teacher_info: TeacherInfo, run: PublishedRun | None = None
) -> dict[str, Any]:
    """Collect the metadata at the card's head, under the Hub's keys."""
    source = run.recipe["data"]["source"] if run else ""
    hub = HUB_NAME_PATTERN.fullmatch(source) if not source.lower().endswith(SUPPORTED_EXTENSIONS) else None
    metadata: dict[str, Any] = {
        **teacher_info.license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["limbeck", "distillation", *_subquadratic_tag(plan), *_mixer_names(plan)])),
    }
    if teacher_info.languages:
        metadata["language"] = teacher_info.languages
    if teacher_info.repo_id:
        metadata["base_model"] = teacher_info.repo_id
    if hub:
        metadata["datasets"] = [hub["name"]]
    return metadata


def assemble_model_card(metadata: dict[str, Any], body: str) -> str:
    """Join metadata and body, and read the metadata back with the Hub's own library."""
    text = f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{body}"
    if ModelCard(text).data.to_dict() != metadata:
        raise LimbeckError("the card's metadata cannot be read back", expected=str(metadata))
    return text


def _opening(repo_id: str, plan: dict[str, Any], teacher_info: TeacherInfo, run: PublishedRun | None) -> str:
    converted, total = len(plan["layers"]), _count_layers(plan)
    names = " and ".join(f"`{name}`" for name in _mixer_names(plan))
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
        lines[-1] += " It was only converted, or its run is missing, so this card has no results."
    elif run.result["stages"]:
        tokens = sum(stage["tokens"] for stage in run.result["stages"])
        lines[-1] += f" It learned from the teacher on {tokens:,} tokens."
    else:
        lines[-1] += " It was not trained."
    if heads := describe_softmax_heads(plan):
        lines[-1] += f" There is still {heads}."
    if run and not run.recipe["student"]["copy_projections"]:
        lines[-1] += " The projections of the replaced layers were initialized at random."
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
    groups: dict[tuple[str, str, str], list[int]] = {}
    for entry in plan["layers"]:
        name, settings, cell = entry["mixer"], entry["options"], f"`{entry['mixer']}`"
        if name == SPLIT_MIXER:
            kept, window = settings["softmax_groups"], settings["softmax_window"]
            cell = f"`{settings['mixer']}`, softmax in head groups {format_ranges(kept)}"
            cell += f" over {window} tokens" if window else ""
            name, settings = settings["mixer"], settings["mixer_options"]
        options = ", ".join(f"{key}={_format_option(value)}" for key, value in settings.items())
        groups.setdefault((name, cell, options), []).append(entry["layer"])
    rows = [(layers, cell, _describe_mixer(name), options) for (name, cell, options), layers in groups.items()]
    softmax_layers = sorted(set(range(_count_layers(plan))) - {entry["layer"] for entry in plan["layers"]})
    if softmax_layers:
        rows.append((softmax_layers, "softmax", "the teacher's own attention", ""))
    cells = [
        [format_ranges(layers), name, escape_markdown(summary), escape_markdown(options)]
        for layers, name, summary, options in sorted(rows, key=lambda row: row[0][0])
    ]
    return "## Layers\n\n" + format_markdown_table(["layers", "mixer", "what it is", "options"], cells, 4).rstrip()


def _training(run: PublishedRun) -> str:
    data, stages = run.recipe["data"], run.result["stages"]
    if not stages:
        return ""
    rows = []
    for settings, facts in zip(run.recipe["stages"], stages):
        learns = settings.get("train", "attention" if settings["stage"] != "calibrate" else "output projections")
        lr = f"{settings['lr']:g}" if "lr" in settings else "closed form"
        if "unexplained" in facts:
            losses = ["", f"{100 * facts['unexplained']:.1f} % unexplained"]
        else:
            losses = [f"{facts['first_loss']:.3f}", f"{facts['loss']:.3f}"]
        rows.append([settings["stage"], learns, f"{facts['tokens']:,}", lr, *losses, format_duration(facts["seconds"])])
    columns = ["stage", "learns", "tokens", "learning rate", "loss at start", "loss at end", "time"]
    if losses := list_guard_losses(stages):
        columns.append("held-out loss")
        rows = [[*row, loss] for row, loss in zip([["before training", *[""] * 6], *rows], losses)]
    source = format_code_span(data["source"])
    if data["source"].removeprefix(REPEATED_TEXT_PREFIX).partition(":")[0] == "embedded":
        source += " (comes with limbeck; its sources and licences are listed in `limbeck.data.offline.corpus`)"
    return (
        f"## Training\n\nText: {source}, in packed sequences of {data['seq_len']} tokens. "
        f"Seed {run.result['seed']}, on {run.manifest.get('gpu') or 'CPU'}.\n\n"
        + format_markdown_table(columns, rows, num_text_columns=len(columns)).rstrip()
    )


def _results(run: PublishedRun) -> str:
    held_out, manifest = run.result["held_out"], run.manifest
    versions = ", ".join(f"{name} {manifest[name]}" for name in ("limbeck", "torch", "transformers", "python"))
    return (
        f"## Results\n\nHeld-out part of the same text: {held_out['targets']:,} tokens in sequences of "
        f"{held_out['length']}.\n\n"
        + format_result_table(run.result, list_quality_rows(run.result))
        + "".join(f"\n{line}\n" for line in (describe_exam(run.result), describe_window(run.result)) if line)
        + f"\nMeasured at the end of `limbeck distill recipe.yaml` with the recipe below ({versions}). To measure "
        f"again in the run's directory: `limbeck eval student --tokens {run.recipe['evaluation']['tokens']}`."
    )


def _memory(run: PublishedRun) -> str:
    table = format_result_table(run.result, list_memory_rows(run.result))
    return f"## Memory\n\n{table}\n{describe_break_even(run.result['memory'])} Counted on real caches in float32."


def _sample(run: PublishedRun) -> str:
    if not run.result["samples"]:
        return ""
    prompt = escape_markdown(run.result["prompt"])
    return f"## Sample\n\nGreedy continuations of: *{prompt}*\n\n{format_samples(run.result)}"


def _limits(teacher_info: TeacherInfo, run: PublishedRun | None, exports: Sequence[tuple[str, ExportRecord]]) -> str:
    points = []
    plain = [f"`{folder}`" for folder, record in exports if record.format == "qwen3_5"]
    if run is None:
        points.append("Nothing was measured. If it was only converted, its text is not usable before distillation.")
    else:
        held_out, tokens = run.result["held_out"], sum(stage["tokens"] for stage in run.result["stages"])
        ratio = held_out["student_perplexity"] / held_out["teacher_perplexity"]
        points += [
            f"After {tokens:,} tokens its perplexity is {ratio:.2f} times the teacher's, and it prefers another next "
            f"token in {100 * (1 - held_out['top1_agreement']):.0f} % of places. "
            "Do not expect it to do what the teacher does.",
            f"The numbers come from one seed and {held_out['targets']:,} tokens of one kind of text in sequences of "
            f"{held_out['length']}. Longer contexts, other text, other languages and tasks were not measured.",
        ]
        if run.result["memory"]["break_even_tokens"] is not None:
            points.append(
                "A smaller memory holds less: such students lose most at copying and looking up text from far back. "
                "That was not measured either."
            )
    points += [
        f"It inherits what {teacher_info.display_name} learned, its mistakes and biases included. Whether the "
        "teacher's instruction following and refusals survived was not tested.",
        "Its code is the package limbeck; transformers alone cannot load it"
        + (f", but loads the copy in {' and '.join(plain)}." if plain else "."),
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
    for name in _list_all_mixers(plan):
        source = registry.get(name).source if registry.is_registered(name) else ""
        if source:
            lines += ["", f"Please cite the mixer `{name}` too: {_link_arxiv(source)}."]
    return "\n".join(lines)


def _mixer_names(plan: dict[str, Any]) -> list[str]:
    """List the mixers of a plan; where groups of heads keep softmax, that of the other groups."""
    return list(dict.fromkeys(name_base_mixer(entry) for entry in plan["layers"]))


def _list_all_mixers(plan: dict[str, Any]) -> list[str]:
    """List the mixers of a plan, and behind them those that they consist of."""
    names = [entry["mixer"] for entry in plan["layers"]]
    for entry in plan["layers"]:
        if registry.is_registered(entry["mixer"]):
            cls = registry.get(entry["mixer"])
            names += cls.list_inner_mixers(cls.options_class.parse(entry["options"], cls.name))
    return list(dict.fromkeys(names))


def _subquadratic_tag(plan: dict[str, Any]) -> list[str]:
    """The tag of models in which no layer looks at all earlier tokens, as a list of one or none."""
    grows = len(plan["layers"]) < _count_layers(plan) or any(_state_grows(entry) for entry in plan["layers"])
    return [] if grows else ["subquadratic"]


def _state_grows(entry: dict[str, Any]) -> bool:
    """Tell whether the state of a plan's layer grows; a mixer that is not registered is taken at its word."""
    if not registry.is_registered(entry["mixer"]):
        return False
    cls = registry.get(entry["mixer"])
    return cls.state_grows(cls.options_class.parse(entry["options"], cls.name))


def _count_layers(plan: dict[str, Any]) -> int:
    """Count the layers with attention. Plans without that number still name the converted ones, a lower bound."""
    numbers = [entry["layer"] + 1 for entry in plan["layers"]]
    return max([shape.get("layers", 1) for shape in plan["shapes"]] + numbers)


def _describe_mixer(name: str) -> str:
    return registry.get(name).summary if registry.is_registered(name) else "a mixer of its authors' own, see its file"


def _link_arxiv(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def _format_option(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
