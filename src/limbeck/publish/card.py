"""The model card: metadata that the hub reads, and what a reader should know before using the student.

    text = write_card("owner/name", plan, origin, run)

Every number comes from the run's own files. A student without a run gets a card without results.
"""

import re
from typing import Any

import yaml

from limbeck import __version__
from limbeck.data.sources import HUB_NAME, KINDS
from limbeck.errors import LimbeckError
from limbeck.mixers import registry
from limbeck.model import as_ranges
from limbeck.publish.origin import Origin
from limbeck.publish.results import RunFacts, run_sections
from limbeck.report.naming import literal

PAPER = "2504.14366"
CITATION = """@misc{haller2025empirical,
  title         = {Empirical Evaluation of Knowledge Distillation from Transformers to Subquadratic Language Models},
  author        = {Patrick Haller and Jonas Golde and Alan Akbik},
  year          = {2025},
  eprint        = {2504.14366},
  archivePrefix = {arXiv}
}"""


def write_card(repo: str, plan: dict[str, Any], origin: Origin, run: RunFacts | None = None) -> str:
    """The whole README.md.

    Args:
        repo: the repository, `owner/name`.
        plan: the student's `config.limbeck`.
        origin: what `find_origin` knows of the teacher.

    Raises:
        LimbeckError: the metadata do not survive being read again.
    """
    parts = [_opening(repo, plan, origin, run), _use(repo, plan), _layers(plan)]
    if run:
        parts += run_sections(run)
    parts += [_limits(origin, run), _recipe(run), _citation(plan)]
    return with_metadata(metadata(plan, origin, run), "\n\n".join(part for part in parts if part) + "\n")


def metadata(plan: dict[str, Any], origin: Origin, run: RunFacts | None = None) -> dict[str, Any]:
    """What stands at the card's head, in the hub's terms."""
    source = run.recipe["data"]["source"] if run else ""
    hub = HUB_NAME.fullmatch(source) if not source.lower().endswith(KINDS) else None
    facts: dict[str, Any] = {
        **origin.licence,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["limbeck", "distillation", *_linear(plan), *_names(plan)])),
    }
    if origin.language:
        facts["language"] = origin.language
    if origin.repo:
        facts["base_model"] = origin.repo
    if hub:
        facts["datasets"] = [hub["name"]]
    return facts


def with_metadata(facts: dict[str, Any], body: str) -> str:
    """A card of metadata and body, read again by the hub's own library to see that both arrive."""
    from huggingface_hub import ModelCard, ModelCardData

    text = f"---\n{ModelCardData(**facts).to_yaml()}\n---\n\n{body}"
    if ModelCard(text).data.to_dict() != facts:
        raise LimbeckError("the card's metadata cannot be read again", expected=str(facts))
    return text


# ---------------------------------------------------------------------- sections


def _opening(repo: str, plan: dict[str, Any], origin: Origin, run: RunFacts | None) -> str:
    converted, total = len(plan["layers"]), _total(plan)
    names = " and ".join(f"`{name}`" for name in _names(plan))
    teacher = f"[{origin.label}](https://huggingface.co/{origin.repo})" if origin.repo else origin.label
    version = run.manifest.get("limbeck", __version__) if run else __version__
    lines = [
        f"# {repo.split('/')[-1]}",
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
    if origin.note:
        lines[-1] += f" {origin.note}"
    return "\n".join(lines)


def _use(repo: str, plan: dict[str, Any]) -> str:
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
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
        f'model = AutoModelForCausalLM.from_pretrained("{repo}"{", trust_remote_code=True" if files else ""})',
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
            f'model = AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True)',
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
        lines.append(f"| {as_ranges(layers)} | {name} | {literal(what)} | {literal(options)} |")
    return "\n".join(lines)


def _limits(origin: Origin, run: RunFacts | None) -> str:
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
        f"It inherits what {origin.label} learnt, its mistakes and biases included. Whether instruction following and "
        "refusals of the teacher survived was not tested.",
        "Its code is the package limbeck; with transformers alone it cannot be loaded.",
    ]
    return "\n".join(["## Limits", "", *(f"- {point}" for point in points)])


def _recipe(run: RunFacts | None) -> str:
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
        f"The procedure follows [arXiv {PAPER}](https://arxiv.org/abs/{PAPER}):",
        "",
        "```bibtex",
        CITATION,
        "```",
    ]
    inner = {str(e["options"]["linear"]) for e in plan["layers"] if e["mixer"] == "hybrid" and "linear" in e["options"]}
    for name in [*_names(plan), *sorted(inner - set(_names(plan)))]:
        source = registry.get(name).source if registry.known(name) else ""
        if source:
            lines += ["", f"Please cite the mixer `{name}` too: {_linked(source)}."]
    return "\n".join(lines)


# ---------------------------------------------------------------------- words


def _names(plan: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(entry["mixer"] for entry in plan["layers"]))


def _linear(plan: dict[str, Any]) -> list[str]:
    """The tag of models in which no layer looks at all tokens before."""
    mixers = [registry.get(name) for name in _names(plan) if registry.known(name)]
    grows = len(plan["layers"]) < _total(plan) or any(mixer.grows for mixer in mixers)
    return [] if grows else ["subquadratic"]


def _total(plan: dict[str, Any]) -> int:
    """Layers with attention in the model; the shapes know, the converted ones are the least that there are."""
    numbers = [entry["layer"] + 1 for entry in plan["layers"]]
    return max([shape.get("layers", 1) for shape in plan["shapes"]] + numbers)


def _summary(name: str) -> str:
    return registry.get(name).summary if registry.known(name) else "a mixer of its authors' own, see its file"


def _linked(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
