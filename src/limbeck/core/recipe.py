"""What a run is: a typed recipe, from YAML, the command line or Python; unknown keys are refused with a suggestion.

    recipe = Recipe.load("quickstart", overrides={"student.mixer": "gla", "stages.hidden.tokens": 20_000})
    Recipe(teacher="Qwen/Qwen3-0.6B", data={"source": "corpus.jsonl"}, out="runs/qwen")
    Recipe.load("runs/qwen/recipe.yaml", stored=True)      # keys by the names that they had when the run began

A recipe is complete: every default is written into the run directory, so that the run can be repeated from it alone.

What a teacher that Limbeck trains itself is: its model, its text, its steps; `recipes/teachers/*.yaml`.

recipe = TeacherRecipe.load("small")
recipe.key                                     # hex: what tells one teacher from another
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from limbeck.core.config import format_validation_error, read_yaml, set_by_dotted_key
from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.core.storage import cache_root

BUILT_IN = Path(__file__).parent / "recipes"

# Keys that had another name once, by part: old name -> name. A recipe that a run or study stored may have the old names
# and is translated as it is read; one that a user writes has to have the new ones. Only names that no key of the same
# part has today may stand on the left.
OLD_KEYS: dict[str, dict[str, str]] = {
    "recipe": {"keep_checkpoints": "save_total_limit", "start": "init", "vocabulary": "vocab_size"},
    "student": {"keep": "softmax_layers"},
    "data": {"length": "seq_len"},
    "stage": {
        "length": "seq_len",
        "batch": "batch_size",
        "micro_batch": "micro_batch_size",
        "warmup": "warmup_ratio",
        "floor": "min_lr_ratio",
        "decay": "lr_scheduler",
        "cooldown": "decay_ratio",
        "clip": "max_grad_norm",
        "ema": "ema_decay",
        "evaluate_every": "eval_steps",
        "evaluate_sequences": "eval_sequences",
        "rows": "sampled_queries",
        "converged": "layer_early_stopping",
        "lr_rest": "lr_other",
        "top": "top_k",
        "chunk": "chunk_size",
    },
    "lora": {"targets": "target_modules"},
    "study": {"about": "description", "keep": "save_artifacts"},
    "grid": {"keep": "softmax_layers"},
}


def from_old_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """Rename the old keys of a stored recipe, given as plain values; all others stay."""
    return _renamed(raw, OLD_KEYS)


def to_old_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """Rename a recipe's keys back, for fingerprints that were first taken over the old names; the order stays."""
    return _renamed(raw, {part: {new: old for old, new in names.items()} for part, names in OLD_KEYS.items()})


def study_from_old_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """Rename the old keys of a stored study, given as plain values: its own, its recipes' and those of its settings."""
    study = {OLD_KEYS["study"].get(key, key): value for key, value in raw.items()}
    if isinstance(study.get("base"), dict):
        study["base"] = from_old_keys(study["base"])
    if isinstance(study.get("grid"), dict):
        grid = {OLD_KEYS["grid"].get(key, key): value for key, value in study["grid"].items()}
        study["grid"] = grid | {
            "settings": {
                axis: {label: {_dotted(key): value for key, value in one.items()} for label, one in values.items()}
                for axis, values in grid.get("settings", {}).items()
            }
        }
    return study


def _dotted(key: str) -> str:
    """Rename the parts of a key such as "stages.hidden.rows"."""
    part, parts = "recipe", []
    for name in key.split("."):
        parts.append(name if part == "stages" else OLD_KEYS.get(part, {}).get(name, name))
        part = "stage" if part == "stages" else name
    return ".".join(parts)


def _renamed(value: Any, names: Mapping[str, Mapping[str, str]], part: str = "recipe") -> Any:
    """Rename the keys of a part of a recipe and of the parts inside it."""
    if part == "stages" and isinstance(value, list):
        return [_renamed(one, names, "stage") for one in value]
    if not isinstance(value, dict):
        return value
    inner = {"recipe": ("student", "data", "stages"), "stage": ("data", "lora")}.get(part, ())
    return {
        names.get(part, {}).get(key, key): _renamed(one, names, key) if key in inner else one
        for key, one in value.items()
    }


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed: ClassVar[Mapping[str, str]] = {}  # its old keys


def _as_text(value: Any) -> Any:
    """A single layer's number, as YAML reads `softmax_layers: 3`, is as good as "3"."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Layers = Annotated[str | list[int], BeforeValidator(_as_text)]


class Rule(_Part):
    """Another mixer for some of the layers."""

    layers: Layers
    mixer: str | None = None  # the student's by default
    preset: Literal["default", "published", "controlled"] | None = None
    options: dict[str, Any] = {}


class Student(_Part):
    """Which mixer stands where, and what it starts from."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["student"]
    mixer: str = "gated_deltanet"
    layers: Layers = "all"
    # what the mixer's options start from: Limbeck's own, its authors', or all mixers alike but for the recurrence
    preset: Literal["default", "published", "controlled"] = "default"
    options: dict[str, Any] = {}
    # layers that keep softmax: none, numbers, "every 4", "uniform 7", or a file that `limbeck select` wrote
    softmax_layers: Layers = "none"
    rules: list[Rule] = []  # later ones over earlier ones
    copy_projections: bool = True  # the teacher's q, k, v and output projections; false draws fresh ones


class Source(_Part):
    """One of several sources."""

    source: str
    weight: Annotated[float, Field(gt=0)] = 1.0  # its share of the sequences is weight / all weights
    text_field: str = "text"
    chat: bool | None = None


class Data(_Part):
    """The text: where it comes from and how it is cut (docs/data.md)."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["data"]
    source: str = "embedded"
    sources: Annotated[list[Source], Field(min_length=1)] | None = None  # several in its place, by weight
    text_field: str = "text"
    # records are conversations, of which the answers are learnt; None: where they have `messages`
    chat: bool | None = None
    seq_len: Annotated[int, Field(ge=16)] = 512  # tokens in a sequence
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.02  # share of the documents kept for evaluation
    max_tokens: Annotated[int, Field(gt=0)] | None = None  # tokenise no more than this of each source
    streaming: bool = False  # tokenise shard by shard as the training goes on, not all of it first
    cache_gb: Annotated[float, Field(gt=0)] = 20.0  # of streaming: room for tokens on disk

    @model_validator(mode="after")
    def _one_way(self) -> "Data":
        if self.streaming and self.max_tokens is not None:
            raise ValueError("max_tokens is for text that is tokenised first; with streaming leave it out (null)")
        if self.sources is not None:
            names = " + ".join(f"{one.weight:g} {one.source}" for one in self.sources)
            if "source" in self.model_fields_set and self.source != names:
                raise ValueError("source and sources are both given; give one of them")
            given = [name for name in ("text_field", "chat") if getattr(self, name) != Data.model_fields[name].default]
            if given:
                raise ValueError(f"{given[0]} belongs to each of the sources")
            object.__setattr__(self, "source", names)  # what is shown and written down
        return self


class _Stage(_Part):
    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["stage"]
    tokens: Annotated[int, Field(gt=0)]
    seq_len: Annotated[int, Field(ge=16)] | None = None  # tokens in a sequence; None: as in data
    data: Data | None = None  # a text of its own
    batch_size: Annotated[int, Field(gt=0)] = 4  # sequences in a step
    micro_batch_size: Annotated[int, Field(gt=0)] | None = None  # sequences at once; None: all of the batch


class Calibrate(_Stage):
    """Stage 0: the output projections by least squares, no gradient."""

    stage: Literal["calibrate"]
    ridge: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"  # share of the mean diagonal
    weight: Literal["none", "inverse_norm"] = "none"  # weight of a token in the fit


class Trained(_Stage):
    lr: Annotated[float, Field(gt=0)]
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of the steps
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1  # learning rate of the last step as a share of the peak
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    # of wsd: share of the steps at the end in which it comes down
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the teacher's matrices; the mixers' own stay with adamw
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0  # largest norm of the gradient
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # hand on the running average of the weights
    eval_steps: Annotated[int, Field(gt=0)] | None = None  # steps between losses on held-out text
    eval_sequences: Annotated[int, Field(gt=0)] = 8
    patience: Annotated[int, Field(gt=0)] | None = (
        None  # stop after so many of these without a better one; keep the best
    )

    @model_validator(mode="after")
    def _patient(self) -> "Trained":
        if self.patience and not self.eval_steps:
            raise ValueError("patience counts losses on held-out text, so eval_steps is needed")
        return self


class EarlyStopping(_Part):
    """When a layer of stages 1 and 2 has learnt what it will: it is left out of the steps that follow."""

    patience: Annotated[int, Field(gt=0)] = 50  # steps without a better running mean of its loss
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01  # share by which the mean has to fall to count as better


class Matrix(Trained):
    """Stage 1: mixing matrices against the teacher's attention matrices."""

    stage: Literal["matrix"]
    lr: Annotated[float, Field(gt=0)] = 1e-3
    micro_batch_size: Annotated[int, Field(gt=0)] | None = (
        1  # one sequence's T x T matrices at a time are the fastest too
    )
    # queries, and so rows of each matrix, that are compared; None: all
    sampled_queries: Annotated[int, Field(gt=0)] | None = None
    layer_early_stopping: EarlyStopping | None = None  # None: every layer learns to the end


class Hidden(Trained):
    """Stage 2: each layer's output against the teacher's, on the teacher's input."""

    stage: Literal["hidden"]
    lr: Annotated[float, Field(gt=0)] = 1e-3
    target: Literal["attention", "block"] = "attention"
    loss: Literal["l2", "relative", "mse", "cosine"] = "relative"
    train: Literal["mixer", "attention", "block"] = "attention"  # mixer: its new parameters alone
    layer_early_stopping: EarlyStopping | None = None  # None: every layer learns to the end


class Lora(_Part):
    """Low-rank adapters on linear layers; they are merged into the weights when the stage is done (docs/peft.md)."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["lora"]
    rank: Annotated[int, Field(gt=0)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0  # the adapter's output is multiplied by alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the adapter's input
    # "attention": the linear layers of the converted attention; "all-linear": those of the body; or their names
    target_modules: str | list[str] = "attention"


class Logits(Trained):
    """Stage 3: the whole student against labels and the teacher's logits."""

    stage: Literal["logits"]
    lr: Annotated[float, Field(gt=0)] = 5e-4
    lr_other: Annotated[float, Field(ge=0)] | None = None  # outside the converted attention; None: a fifth of lr
    batch_size: Annotated[int, Field(gt=0)] = 1
    # body: everything but embeddings and head; lora: adapters on linear layers, and the mixers in full
    train: Literal["attention", "body", "all", "lora"] = "body"
    lora: Lora | None = None  # given, it is what trains instead of the body
    ce: Annotated[float, Field(ge=0)] = 0.0  # weight of the cross-entropy on the labels
    kl: Annotated[float, Field(ge=0)] = 1.0  # of KL(teacher || student)
    reverse_kl: Annotated[float, Field(ge=0)] = 0.0  # of KL(student || teacher)
    jsd: Annotated[float, Field(ge=0)] = 0.0  # of the generalised Jensen-Shannon divergence
    top_kl: Annotated[float, Field(ge=0)] = 0.0  # of KL over the teacher's `top_k` likeliest tokens and the rest as one
    temperature: Annotated[float, Field(gt=0)] = 1.0
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of jsd: the teacher's share of the mixture
    top_k: Annotated[int, Field(gt=0)] = 32
    # tokens whose logits exist at once; None: 128 on a CPU, on a GPU as many as make half a gigabyte of them
    chunk_size: Annotated[int, Field(gt=0)] | None = None
    # "top-k": what the teacher says of the stage's text, its `top_k` likeliest tokens, is written to the cache once and
    # read from there by this and later runs; with top_kl and ce
    cache_teacher: Literal["top-k"] | None = None
    checkpoint_activations: bool = False  # keep each block's input alone and run it again: less memory, more time
    # full: each of several processes keeps a part of every block's weights and optimiser state (docs/scaling.md)
    sharding: Literal["none", "full"] = "none"

    @model_validator(mode="after")
    def _some_loss(self) -> "Logits":
        if not any((self.ce, self.kl, self.reverse_kl, self.jsd, self.top_kl)):
            raise ValueError("ce, kl, reverse_kl, jsd and top_kl are all 0, so there is nothing to learn from")
        if self.cache_teacher and (self.kl or self.reverse_kl or self.jsd or self.temperature != 1):
            raise ValueError(
                "cache_teacher keeps the teacher's likeliest tokens alone, so it takes top_kl and ce at temperature 1 "
                "(--set stages.N.kl=0 --set stages.N.top_kl=1 --set stages.N.top_k=64)"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _of_old(cls, raw: Any) -> Any:
        """Runs of before the objectives were plug-ins say in which direction the divergence goes."""
        if not isinstance(raw, dict) or raw.get("direction") not in ("forward", "reverse"):
            return raw
        raw = dict(raw)
        if raw.pop("direction") == "reverse":
            raw |= {"kl": 0.0, "reverse_kl": raw.get("kl", 1.0)}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _lora_trains(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if raw.get("lora") is not None and raw.get("train", "body") == "body":  # the default: nobody asked for it
            return {**raw, "train": "lora"}
        if raw.get("train") == "lora" and raw.get("lora") is None:
            return {**raw, "lora": {}}
        if raw.get("lora") is not None and raw["train"] != "lora":
            raise ValueError(f"lora is given, so it is what trains, and train is {raw['train']!r}, not 'lora'")
        return raw


StageRecipe = Annotated[Calibrate | Matrix | Hidden | Logits, Field(discriminator="stage")]
STAGES: dict[str, type[_Stage]] = {"calibrate": Calibrate, "matrix": Matrix, "hidden": Hidden, "logits": Logits}


class Evaluation(_Part):
    """What is measured on held-out text when the stages are done."""

    tokens: Annotated[int, Field(gt=0)] = 8192
    prompt: str | None = "The history of science is"
    new_tokens: Annotated[int, Field(ge=0)] = 48


def is_stored(path: Path) -> bool:
    """Whether a recipe or study is the one that a run or study directory keeps, and not a user's file."""
    beside = ("manifest.json", "study.json", ".lock")
    return path.name in ("recipe.yaml", "study.yaml") and any((path.parent / name).exists() for name in beside)


class Document(_Part):
    """Settings that are kept as YAML: of a run (`Recipe`), or of a teacher that is trained here."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["recipe"]
    built_in: ClassVar[Path] = BUILT_IN  # where those are that come with limbeck
    tagged: ClassVar[Mapping[str, type[_Stage]]] = STAGES  # the kinds of stages by name
    data: Data = Data()

    @classmethod
    def load(
        cls, source: str | Path = "quickstart", overrides: dict[str, Any] | None = None, *, stored: bool = False
    ) -> Self:
        """A built-in recipe by name or a YAML file, with dotted overrides ("stages.hidden.lr": 1e-3) applied.

        Args:
            stored: the file is a run's own, which an earlier version may have written; so is any recipe.yaml in a run
                directory.

        Raises:
            LimbeckError: no such recipe, broken YAML, unknown key (with a suggestion) or impossible value.
        """
        path = Path(source) if Path(source).suffix in (".yaml", ".yml") else cls.built_in / f"{source}.yaml"
        if not path.is_file():
            built_in = sorted(p.stem for p in cls.built_in.glob("*.yaml"))
            raise LimbeckError(
                f"there is no recipe '{source}'{suggest_closest(str(source), built_in)}",
                expected=f"a YAML file, or one of: {', '.join(built_in)}",
            )
        raw = read_yaml(path, "recipe", "keys such as teacher, student, data, stages")
        if stored or is_stored(path):
            raw = from_old_keys(raw)
        for key, value in (overrides or {}).items():
            set_by_dotted_key(raw, key, value)
        return cls.parse(raw, str(source))

    @classmethod
    def parse(cls, raw: dict[str, Any], origin: str = "recipe") -> Self:
        """A recipe from plain values; LimbeckError instead of pydantic's own."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise format_validation_error(error, origin, cls, cls.tagged) from error

    def to_yaml(self) -> str:
        """The complete recipe as YAML, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def text_of(self, stage: _Stage) -> Data:
        """The text of a stage, with the length of sequences that it has there."""
        data = stage.data or self.data
        return data if stage.seq_len is None else data.model_copy(update={"seq_len": stage.seq_len})


class Recipe(Document):
    """A whole run."""

    name: str = "custom"
    teacher: str = "embedded"
    teacher_bits: Literal[8, 4] | None = None  # the teacher's linear layers in so many bits; None: float32
    student: Student = Student()
    data: Data = Data()
    stages: list[StageRecipe] = []
    evaluation: Evaluation = Evaluation()
    seed: int = Field(0, ge=0, lt=2**62)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # of products under autocast; weights are float32. auto: bf16 on a GPU that has it, fp16 on an older one, else fp32
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    tf32: bool = False  # products of float32 in TF32, on NVIDIA GPUs that have it
    # blocks and losses through torch.compile; auto: on a GPU (docs/gpu.md)
    compile: bool | Literal["auto"] = "auto"
    # how packed documents are kept apart on a GPU; auto: by their ends, through FlashAttention, where the family allows
    # that; mask: by transformers' own masks
    attention: Literal["auto", "mask"] = "auto"
    backend: Literal["auto", "torch", "fla"] = "auto"  # of the operators; fla: a call that no kernel takes is an error
    deterministic: bool = False  # the same bits again on the same GPU; what cannot be is an error
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    save_total_limit: Annotated[int, Field(gt=0)] = 2  # of a stage that is at work
    # who is told of each step, beside metrics.jsonl; auto: TensorBoard where it is installed (docs/training.md)
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] | Literal["auto"] = "auto"
    out: str | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequences that any stage reads."""
        return max(text.seq_len for text in (self.data, *map(self.text_of, self.stages)))


FORMAT = 2  # raise when the same recipe makes another teacher: text, vocabulary, start or steps changed


class NextTokenConfig(Trained):
    """Steps of plain language modelling."""

    stage: Literal["next_token"]
    lr: Annotated[float, Field(gt=0)] = 3e-3


class RepeatsConfig(NextTokenConfig):
    """The same on lists of random tokens that come again (`limbeck.data.synthetic`), before any text is read."""

    stage: Literal["repeats"]  # type: ignore[assignment]


class TeacherRecipe(Document):
    """A whole teacher."""

    built_in: ClassVar[Path] = BUILT_IN / "teachers"
    tagged: ClassVar[Mapping[str, type[Trained]]] = {"repeats": RepeatsConfig, "next_token": NextTokenConfig}

    name: str
    model: dict[str, Any]  # fields of the family's config in transformers, `model_type` among them
    init: Literal["random", "look_back"] = "random"  # weights before the first step, see `limbeck.training.pretraining`
    vocab_size: Annotated[int, Field(ge=300)]  # tokens of the byte-level BPE, special ones included
    data: Data
    stages: Annotated[
        list[Annotated[NextTokenConfig | RepeatsConfig, Field(discriminator="stage")]], Field(min_length=1)
    ]
    seed: int = Field(0, ge=0, lt=2**62)
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    save_total_limit: Annotated[int, Field(gt=0)] = 2
    trackers: list[str] = []

    @property
    def key(self) -> str:
        """Hash of all that the weights depend on, machine and versions aside."""
        settings = self.model_dump(mode="json", exclude={"name", "checkpoint_seconds", "save_total_limit", "trackers"})
        # by the names that the keys had first, so that teachers in a cache stay valid
        return hashlib.sha256(json.dumps([FORMAT, to_old_keys(settings)], sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        """Where the finished teacher is, or will be."""
        return cache_root() / "assets" / f"teacher-{self.name}-{self.key[:12]}"

    @classmethod
    def names(cls) -> list[str]:
        """Those that come with limbeck."""
        return sorted(path.stem for path in cls.built_in.glob("*.yaml"))


AnyRecipe = Recipe | TeacherRecipe  # what a run directory can be of
