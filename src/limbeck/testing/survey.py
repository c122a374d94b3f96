"""Survey of transformers' families: which can be converted into students, what fails, and what their attention has.

    for row in survey_families(["qwen3", "bloom"], mixer="gated_deltanet"):
        print(row.family, row.status, row.problem)      # qwen3 works; bloom no: attention code of its own
    survey_family("deepseek_v3", "gla").features        # ['keys and values of different width', 'experts', ...]

A tiny random model of each family (`limbeck.testing.tiny_models`) is converted and its student put through the checks
of `limbeck.testing.student_checks`. No failure of a family ends the survey: each becomes one line, which says if the
family's own softmax model has the same fault.
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

from limbeck import mixers
from limbeck.core.errors import LimbeckError
from limbeck.models import Site, find_attention_sites
from limbeck.models.probe import find_kv_sharing
from limbeck.testing.student_checks import ModelChecks, StudentChecks, make_random_ids
from limbeck.testing.tiny_models import list_families, make_survey_model

TIMEOUT = 60.0  # seconds for a family; most take about one
COMMON_FAMILIES = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2", "gpt_neox"),
    *("mixtral", "qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v3", "bloom"),
]
CHECKS_ALL_LAYERS = ("forward", "steps", "pieces", "padding", "generate")
CHECKS_ONE_LAYER = ("forward", "steps", "padding", "generate")
# checks that are skipped after a failure, which would make them fail too
CONSEQUENCES = {"steps": ("pieces", "generate"), "padding": ("generate",)}


@dataclass(frozen=True)
class FamilyResult:
    """The result of one family."""

    family: str
    architecture: str
    status: str = "works"  # "works", "partly" (a student with faults) or "no" (no student)
    problem: str = ""
    features: list[str] = field(default_factory=list)
    seconds: float = 0.0


class SurveyTimeout(BaseException):
    """A family took too long. Not an Exception, so that no handler on the way takes it for a fault of the family."""


def survey_families(families: list[str] | None = None, mixer: str = "gated_deltanet") -> Iterator[FamilyResult]:
    """Yield the results of these families, or of all in the installed transformers."""
    for family in families or list_families():
        yield survey_family(family, mixer)


@torch.no_grad()
def survey_family(family: str, mixer: str = "gated_deltanet", seconds: float = TIMEOUT) -> FamilyResult:
    """Make a tiny model of a family, convert it with a mixer, and check the student.

    Raises:
        LimbeckError: transformers has no such family, or Limbeck no such mixer.
    """
    mixers.get(mixer)
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        make_survey_model(family)  # raises with the closest name
    start = time.monotonic()
    status, problem = "no", ""
    features: list[str] = []
    try:
        with _time_limit(seconds):
            status, problem, features = _examine(family, mixer)
    except SurveyTimeout:
        problem = f"takes more than {seconds:.0f} s at its tiniest"
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    architecture = classes if isinstance(classes, str) else classes[0]
    problem = problem.removeprefix(f"the family '{family}' ({architecture}) ")
    return FamilyResult(family, architecture, status, problem, features, time.monotonic() - start)


def _examine(family: str, mixer: str) -> tuple[str, str, list[str]]:
    """Return status, problems and features of a family."""
    try:
        single = make_survey_model(family)
    except Exception as error:
        return "no", f"no tiny model can be made: {_line(error)}", []
    try:
        teacher = _in_float64(family, single)
    except Exception as error:
        return "no", f"its own forward pass fails: {_line(error)}", []
    try:
        sites = find_attention_sites(teacher)
        student = StudentChecks(teacher, mixer)
    except Exception as error:
        return "no", _line(error), []
    features = features_of(teacher, sites)
    problems: dict[str, str] = {}
    for check in CHECKS_ALL_LAYERS:
        _record_failure(problems, check, student, ModelChecks(teacher))
    _record_failure(problems, "save", StudentChecks(single, mixer))
    try:
        hybrid = StudentChecks(teacher, mixer, [0])
    except LimbeckError:  # later layers read the keys and values of layer 0
        hybrid = StudentChecks(teacher, mixer, [len(sites) - 1])
    if len(sites) > 1:
        for check in CHECKS_ONE_LAYER:
            _record_failure(problems, check, hybrid, ModelChecks(teacher), "one layer converted: ")
    return ("partly" if problems else "works"), "; ".join(problems.values()), features


def _in_float64(family: str, single: PreTrainedModel) -> PreTrainedModel:
    """Return the model in float64, or `single` in float32 if the family's code does not support float64."""
    model = make_survey_model(family).double()
    try:
        model(make_random_ids(), use_cache=False)
    except Exception:
        single(make_random_ids(), use_cache=False)
        return single
    return model


def _record_failure(
    problems: dict[str, str], check: str, student: ModelChecks, teacher: ModelChecks | None = None, prefix: str = ""
) -> None:
    """Run a check and record a failure once, with whether the teacher fails too."""
    if any(check in CONSEQUENCES.get(earlier, ()) for earlier in problems) or check in problems:
        return
    problem = _failure(student, check)
    if problem is not None:
        teacher_fails = teacher is not None and _failure(teacher, check) is not None
        problems[check] = prefix + problem + (" (so it is in the teacher)" if teacher_fails else "")


def _failure(model: ModelChecks, check: str) -> str | None:
    try:
        getattr(model, check)()
    except Exception as error:
        return _line(error)
    return None


def features_of(model: PreTrainedModel, sites: list[Site]) -> list[str]:
    """List the special features of a family's attention, from a tiny model of it."""
    config = model.config.get_text_config(decoder=True)
    attention = [model.get_submodule(site.module) for site in sites]
    children = [name for module in attention for name, _ in module.named_modules()]
    modules = {name.rsplit(".", 1)[-1]: type(module).__name__ for name, module in model.named_modules()}
    kinds = getattr(config, "layer_types", None) or []
    shape = sites[0].shape
    head = model.get_output_embeddings()
    caches = DynamicCache(config=model.config).layers
    features = {
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
    return [name for name, present in features.items() if present]


def render_markdown(rows: list[FamilyResult]) -> str:
    """Render the rows as a Markdown table, after their counts."""
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
    """Summarize an error in one line."""
    if isinstance(error, LimbeckError):
        return error.found
    text = " ".join(str(error).split()).split(". ")[0]
    text = text if len(text) <= 180 else text[:180].rsplit(" ", 1)[0] + " ..."
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise SurveyTimeout after so many seconds, if the system has alarms and this is the main thread."""
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
