"""Which of transformers' causal language models can become students, found out by doing it.

    for row in survey_families(["qwen3", "bloom"], mixer="gated_deltanet"):
        print(row.family, row.status, row.problem)      # qwen3 works; bloom no: attention code of its own

Every family is made as a tiny random model (`tiny.py`), converted and put through the checks (`checks.py`).

One row a family: does it work, what does not, and what is special about its attention.

    row = survey_family("deepseek_v3", "gla")
    row.status, row.problem, row.features       # 'works', '', ['keys 16 and values 12 wide', 'experts', ...]

Nothing that a family does can stop the walk: every failure becomes one line. What the family's own model cannot do
either is said to be so.
"""

import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from limbeck.core.errors import LimbeckError
from limbeck.models import Site, find_attention_sites
from limbeck.models.probe import find_kv_sharing
from limbeck.testing.student_checks import ModelChecks, StudentChecks, make_random_ids
from limbeck.testing.tiny_models import list_families, make_survey_model

SECONDS = 60.0  # a family's time; they take about one
COMMON_FAMILIES = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2", "gpt_neox"),
    *("mixtral", "qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v3", "bloom"),
]
ALL_LAYERS = ("forward", "steps", "pieces", "padding", "generate")
MIXED = ("forward", "steps", "padding", "generate")
CONSEQUENCES = {"steps": ("pieces", "generate"), "padding": ("generate",)}  # what fails with it is not news


@dataclass(frozen=True)
class FamilyResult:
    """What became of one family."""

    family: str
    architecture: str
    status: str = "works"  # works, partly: a student with faults, no: no student
    problem: str = ""
    features: list[str] = field(default_factory=list)
    seconds: float = 0.0


class SurveyTimeout(BaseException):
    """A family took longer than it may. No `except Exception` on the way may take it for a fault of the family."""


def survey_families(families: list[str] | None = None, mixer: str = "gated_deltanet") -> Iterator[FamilyResult]:
    """Rows of these families, or of all that the installed transformers has."""
    for family in families or list_families():
        yield survey_family(family, mixer)


@torch.no_grad()
def survey_family(family: str, mixer: str = "gated_deltanet", seconds: float = SECONDS) -> FamilyResult:
    """Make a tiny model, convert it with that mixer, and check the student.

    Raises:
        LimbeckError: transformers has no such family, or Limbeck no such mixer.
    """
    from limbeck import mixers

    mixers.get(mixer)
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        make_survey_model(family)  # says what is near
    start = time.monotonic()
    status, problem = "no", ""
    features: list[str] = []
    try:
        with _time_limit(seconds):
            status, problem, features = _examined(family, mixer)
    except SurveyTimeout:
        problem = f"takes more than {seconds:.0f} s at its tiniest"
    names_of = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    architecture = names_of if isinstance(names_of, str) else names_of[0]
    problem = problem.removeprefix(f"the family '{family}' ({architecture}) ")
    return FamilyResult(family, architecture, status, problem, features, time.monotonic() - start)


def _examined(family: str, mixer: str) -> tuple[str, str, list[str]]:
    try:
        single = make_survey_model(family)
    except Exception as error:
        return "no", f"no tiny model can be made: {_line(error)}", []
    try:
        teacher = _widest(family, single)
    except Exception as error:
        return "no", f"its own forward pass fails: {_line(error)}", []
    try:
        sites = find_attention_sites(teacher)
        student = StudentChecks(teacher, mixer)
    except Exception as error:
        return "no", _line(error), []
    features = features_of(teacher, sites)
    problems: dict[str, str] = {}
    for check in ALL_LAYERS:
        _note(problems, check, student, ModelChecks(teacher))
    _note(problems, "save", StudentChecks(single, mixer))
    try:
        mixed = StudentChecks(teacher, mixer, [0])
    except LimbeckError:  # the layers after it read its keys and values
        mixed = StudentChecks(teacher, mixer, [len(sites) - 1])
    if len(sites) > 1:
        for check in MIXED:
            _note(problems, check, mixed, ModelChecks(teacher), "one layer converted: ")
    return ("partly" if problems else "works"), "; ".join(problems.values()), features


def _widest(family: str, single: PreTrainedModel) -> PreTrainedModel:
    """The model in float64 where its code allows it."""
    model = make_survey_model(family).double()
    try:
        model(make_random_ids(), use_cache=False)
    except Exception:
        single(make_random_ids(), use_cache=False)
        return single
    return model


def _note(
    problems: dict[str, str], check: str, student: ModelChecks, teacher: ModelChecks | None = None, prefix: str = ""
) -> None:
    """Run a check; what fails is noted once, and with it whether the teacher fails too."""
    if any(check in CONSEQUENCES.get(earlier, ()) for earlier in problems) or check in problems:
        return
    problem = _failure(student, check)
    if problem is not None:
        too = teacher is not None and _failure(teacher, check) is not None
        problems[check] = prefix + problem + (" (so it is in the teacher)" if too else "")


def _failure(model: ModelChecks, check: str) -> str | None:
    try:
        getattr(model, check)()
    except Exception as error:
        return _line(error)
    return None


def features_of(model: PreTrainedModel, sites: list[Site]) -> list[str]:
    """What is special about a family's attention, read off a tiny model of it."""
    config = model.config.get_text_config(decoder=True)
    attention = [model.get_submodule(site.module) for site in sites]
    children = [name for module in attention for name, _ in module.named_modules()]
    modules = {name.rsplit(".", 1)[-1]: type(module).__name__ for name, module in model.named_modules()}
    kinds = getattr(config, "layer_types", None) or []
    shape = sites[0].shape
    head = model.get_output_embeddings()
    caches = DynamicCache(config=model.config).layers
    found = {
        "grouped heads": any(site.shape.kv_heads < site.shape.heads for site in sites),
        "keys and values of different width": shape.key_width != shape.value_width,
        "q/k norms": any(re.fullmatch(r"(.*\.)?(q|k|qk|query|key)_?(layer)?_?norm", name) for name in children),
        "biases": any(isinstance(m, nn.Linear) and m.bias is not None for a in attention for m in a.modules()),
        "learned positions": any(re.search(r"^wpe$|embed_positions|position_embeddings", name) for name in modules),
        "sliding window": "sliding_attention" in kinds or bool(getattr(config, "sliding_window", None) and not kinds),
        "chunked attention": getattr(config, "attention_chunk_size", None) is not None,
        "soft caps": any("softcap" in name and value for name, value in vars(config).items()),
        "sinks": any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in model.named_parameters()),
        "sparse attention": any("Indexer" in kind for kind in modules.values()),
        "shared keys and values": bool(find_kv_sharing(model)),
        "linear layers": any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in caches),
        "experts": any(re.search(r"experts$", name) for name in modules),
        "tied head": head is not None and head.weight is model.get_input_embeddings().weight,
        "inside a multimodal model": config is not model.config,
    }
    return [name for name, there in found.items() if there]


def render_markdown(rows: list[FamilyResult]) -> str:
    """The rows as a table, with their counts in front."""
    counts = Counter(row.status for row in rows)
    lines = [
        f"{counts['works']} work, {counts['partly']} work partly, {counts['no']} do not.",
        "",
        "| family | class | status | its attention | what fails, or why not |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r.family}` | {r.architecture} | {r.status} | {', '.join(r.features)} | {r.problem.replace('|', '/')} |"
        for r in rows
    ]
    return "\n".join(lines)


def _line(error: Exception) -> str:
    """What went wrong in one line."""
    if isinstance(error, LimbeckError):
        return error.found
    text = " ".join(str(error).split()).split(". ")[0]
    text = text if len(text) <= 180 else text[:180].rsplit(" ", 1)[0] + " ..."
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise SurveyTimeout after so many seconds, where the system has alarms and this is the main thread."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise SurveyTimeout

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
