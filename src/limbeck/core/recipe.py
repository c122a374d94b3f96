"""Recipes: all settings of a distillation run, or of a small teacher's pretraining, typed and validated.

    recipe = Recipe.load("quickstart", overrides={"student.mixer": "gla", "stages.hidden.tokens": 20_000})
    Recipe(teacher="Qwen/Qwen3-0.6B", data={"source": "corpus.jsonl"}, out="runs/qwen")
    Recipe.load("runs/qwen/recipe.yaml", stored=True)      # may have the key names of an earlier version
    TeacherRecipe.load("small").key                        # hex: identifies the teacher by its settings

Unknown keys are refused with a suggestion. A run directory stores its recipe with all defaults, so that the run can be
repeated from that file alone.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from limbeck.core.config import build_short_signature, format_validation_error, read_yaml, set_by_dotted_key
from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.core.old_keys import OLD_KEYS, from_old_keys, to_old_keys
from limbeck.core.repeated_text import has_repeated_text, name_repeated_text
from limbeck.core.storage import cache_root

BUILT_IN = Path(__file__).parent / "recipes"


class _Part(BaseModel):
    """A part of a recipe: frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed: ClassVar[Mapping[str, str]] = {}  # old names of its keys


def _as_text(value: Any) -> Any:
    """Accept a single layer's number, as YAML reads `softmax_layers: 3`, as well as "3"."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Layers = Annotated[str | list[int], BeforeValidator(_as_text)]


def _refuse_numbers(value: Any) -> Any:
    """Refuse the name of a group that YAML reads as a number: 18.2 and 18.20 are two groups and one number."""
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, float) or (isinstance(name, int) and isinstance(value, list)):
            raise ValueError(f'{name} is a number; quote groups of heads, as in ["18.2", "20.0"]')
    return value


HeadGroupNames = Annotated[Annotated[int, Field(ge=1)] | str | list[str], BeforeValidator(_refuse_numbers)]


class Rule(_Part):
    """A different mixer for some of the layers."""

    layers: Layers
    mixer: str | None = None  # the student's by default
    preset: Literal["default", "published", "controlled"] | None = None
    options: dict[str, Any] = {}


class Student(_Part):
    """Which mixer replaces attention in which layers, and how it is initialized."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["student"]
    mixer: str = "gated_deltanet"
    layers: Layers = "all"
    # defaults of the mixer's options: Limbeck's, its authors', or the same for all mixers but for the recurrence
    preset: Literal["default", "published", "controlled"] = "default"
    options: dict[str, Any] = {}
    # layers that keep softmax attention: none, numbers, "every 4", "uniform 7", or a file written by `limbeck select`
    softmax_layers: Layers = "none"
    # groups of heads that keep softmax in converted layers: none, layer.group as in ["18.2", "20.0"], a file written by
    # `limbeck select --heads`, or a number: so many are chosen so at the start of the run
    softmax_heads: HeadGroupNames = "none"
    # tokens that those groups see, besides the first four, so that their memory does not grow; 0 for all
    softmax_window: Annotated[int, Field(ge=0)] = 0
    rules: list[Rule] = []  # later rules override earlier ones
    copy_projections: bool = True  # start from the teacher's q, k, v and output projections; false: random ones


class Source(_Part):
    """One of several sources of text."""

    source: str
    weight: Annotated[float, Field(gt=0)] = 1.0  # its share of the sequences is weight / all weights
    text_field: str = "text"
    chat: bool | None = None


class Data(_Part):
    """The text: where it comes from and how it is cut into sequences (docs/guides/data.md)."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["data"]
    source: str = "embedded"
    sources: Annotated[list[Source], Field(min_length=1)] | None = None  # instead of `source`: several, by weight
    text_field: str = "text"
    # records are conversations and only answers are targets; None: detected by a field `messages`
    chat: bool | None = None
    seq_len: Annotated[int, Field(ge=16)] = 512  # tokens in a sequence
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.02  # share of the documents reserved for evaluation
    max_tokens: Annotated[int, Field(gt=0)] | None = None  # tokenize at most this much of each source
    # whole: each sequence is the beginning of one document of at least seq_len tokens
    documents: Literal["packed", "whole"] = "packed"
    streaming: bool = False  # tokenize shard by shard during training, not everything first
    cache_gb: Annotated[float, Field(gt=0)] = 20.0  # with streaming: disk space for tokens

    @model_validator(mode="after")
    def _check_sources(self) -> "Data":
        if self.streaming and self.max_tokens is not None:
            raise ValueError("max_tokens limits text that is tokenized in advance; with streaming leave it out (null)")
        if self.streaming and (has_repeated_text(self) or self.documents == "whole"):
            raise ValueError("repeated-text and documents: whole choose among all documents, so without streaming")
        if self.sources is not None:
            names = " + ".join(f"{one.weight:g} {one.source}" for one in self.sources)
            if "source" in self.model_fields_set and self.source != names:
                raise ValueError("source and sources exclude each other; set one of them")
            for name in ("text_field", "chat"):
                if getattr(self, name) != Data.model_fields[name].default:
                    raise ValueError(f"with several sources, {name} has to be set for each source")
            object.__setattr__(self, "source", names)  # for messages and for the stored recipe
        return self

    def list_sources(self) -> list[Source]:
        """List the sources: those of a mixture, or the only one."""
        return self.sources or [Source(source=self.source, text_field=self.text_field, chat=self.chat)]


class _Stage(_Part):
    """Settings that all stages share."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["stage"]
    tokens: Annotated[int, Field(gt=0)]
    seq_len: Annotated[int, Field(ge=16)] | None = None  # tokens in a sequence; None: as in data
    data: Data | None = None  # a text for this stage alone
    batch_size: Annotated[int, Field(gt=0)] = 4  # sequences per optimizer step
    micro_batch_size: Annotated[int, Field(gt=0)] | None = None  # sequences per forward pass; None: the whole batch


class Calibrate(_Stage):
    """Stage 0: solve for the output projections by least squares, without gradients."""

    stage: Literal["calibrate"]
    ridge: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"  # share of the mean diagonal
    weight: Literal["none", "inverse_norm"] = "none"  # weight of each token in the least squares


class Trained(_Stage):
    """Settings of a stage that trains by gradient descent."""

    lr: Annotated[float, Field(gt=0)]
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of the steps
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1  # last learning rate / peak learning rate
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    # with wsd: share of the steps, at the end, in which the learning rate decays
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the teacher's matrices; the mixers' parameters use adamw
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0  # gradients are clipped to this norm
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # the result is this running average of the weights
    eval_steps: Annotated[int, Field(gt=0)] | None = None  # steps between evaluations on held-out text
    eval_sequences: Annotated[int, Field(gt=0)] = 8
    # stop after so many evaluations without a lower loss, and keep the best weights
    patience: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check_patience(self) -> "Trained":
        if self.patience and not self.eval_steps:
            raise ValueError("patience counts evaluations on held-out text, so it requires eval_steps")
        return self


class EarlyStopping(_Part):
    """Per-layer early stopping in stages 1 and 2: a converged layer is skipped in later steps."""

    patience: Annotated[int, Field(gt=0)] = 50  # steps without a lower running mean of the layer's loss
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01  # relative decrease that counts as lower


class Matrix(Trained):
    """Stage 1: match mixing matrices to the teacher's attention matrices."""

    stage: Literal["matrix"]
    lr: Annotated[float, Field(gt=0)] = 1e-3
    # the [T, T] matrices of one sequence at a time take the least memory, and are the fastest too
    micro_batch_size: Annotated[int, Field(gt=0)] | None = 1
    # number of queries, that is rows of each matrix, that are compared; None: all
    sampled_queries: Annotated[int, Field(gt=0)] | None = None
    layer_early_stopping: EarlyStopping | None = None  # None: train every layer to the end


class Hidden(Trained):
    """Stage 2: match each layer's output to the teacher's, on the teacher's input."""

    stage: Literal["hidden"]
    lr: Annotated[float, Field(gt=0)] = 1e-3
    target: Literal["attention", "block"] = "attention"
    loss: Literal["l2", "relative", "mse", "cosine"] = "relative"
    train: Literal["mixer", "attention", "block"] = "attention"  # mixer: only its new parameters
    layer_early_stopping: EarlyStopping | None = None  # None: train every layer to the end


class Lora(_Part):
    """Low-rank adapters on linear layers, merged into the weights at the end of the stage (docs/guides/peft.md)."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["lora"]
    rank: Annotated[int, Field(gt=0)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0  # the adapter's output is multiplied by alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # on the adapter's input
    # "attention": linear layers of the converted attention; "all-linear": those of the backbone; or their names
    target_modules: str | list[str] = "attention"


class Logits(Trained):
    """Stage 3: train the whole student on the teacher's logits and on labels."""

    stage: Literal["logits"]
    lr: Annotated[float, Field(gt=0)] = 5e-4
    lr_other: Annotated[float, Field(ge=0)] | None = None  # outside the converted attention; None: a fifth of lr
    batch_size: Annotated[int, Field(gt=0)] = 1
    # body: everything but embeddings and head; lora: adapters on linear layers, and all mixer parameters
    train: Literal["attention", "body", "all", "lora"] = "body"
    lora: Lora | None = None  # if set, adapters train instead of the body
    ce: Annotated[float, Field(ge=0)] = 0.0  # weight of the cross-entropy on the labels
    kl: Annotated[float, Field(ge=0)] = 1.0  # of KL(teacher || student)
    reverse_kl: Annotated[float, Field(ge=0)] = 0.0  # of KL(student || teacher)
    jsd: Annotated[float, Field(ge=0)] = 0.0  # of the generalized Jensen-Shannon divergence
    top_kl: Annotated[float, Field(ge=0)] = (
        0.0  # of KL over the teacher's `top_k` most likely tokens and all others as one
    )
    temperature: Annotated[float, Field(gt=0)] = 1.0
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of jsd: the teacher's share of the mixture
    top_k: Annotated[int, Field(gt=0)] = 32
    # tokens whose logits exist at once; None: 128 on a CPU, on a GPU as many as make half a gigabyte of them
    chunk_size: Annotated[int, Field(gt=0)] | None = None
    # "top-k": the teacher's `top_k` most likely tokens at each position of the stage's text are computed once and then
    # read from the cache, by this and later runs; with top_kl and ce
    cache_teacher: Literal["top-k"] | None = None
    checkpoint_activations: bool = False  # recompute blocks in the backward pass: less memory, more time
    # full: shard every block's weights and optimizer state over the processes, FSDP (docs/guides/scaling.md)
    sharding: Literal["none", "full"] = "none"

    @model_validator(mode="after")
    def _check_losses(self) -> "Logits":
        if not any((self.ce, self.kl, self.reverse_kl, self.jsd, self.top_kl)):
            raise ValueError("at least one of ce, kl, reverse_kl, jsd and top_kl has to be greater than 0")
        if self.cache_teacher and (self.kl or self.reverse_kl or self.jsd or self.temperature != 1):
            raise ValueError(
                "cache_teacher has only the teacher's most likely tokens, so it supports top_kl and ce at temperature 1"
                " (--set stages.N.kl=0 --set stages.N.top_kl=1 --set stages.N.top_k=64)"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _read_old_direction(cls, raw: Any) -> Any:
        """Translate `direction`, which stored recipes of early versions have, to kl or reverse_kl."""
        if not isinstance(raw, dict) or raw.get("direction") not in ("forward", "reverse"):
            return raw
        raw = dict(raw)
        if raw.pop("direction") == "reverse":
            raw |= {"kl": 0.0, "reverse_kl": raw.get("kl", 1.0)}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _align_lora_and_train(cls, raw: Any) -> Any:
        """Set `train: lora` if lora is set, and the other way round."""
        if not isinstance(raw, dict):
            return raw
        if raw.get("lora") is not None and raw.get("train", "body") == "body":  # the default
            return {**raw, "train": "lora"}
        if raw.get("train") == "lora" and raw.get("lora") is None:
            return {**raw, "lora": {}}
        if raw.get("lora") is not None and raw["train"] != "lora":
            raise ValueError(f"lora is set, so train has to be 'lora', not {raw['train']!r}")
        return raw


StageRecipe = Annotated[Calibrate | Matrix | Hidden | Logits, Field(discriminator="stage")]
STAGES: dict[str, type[_Stage]] = {"calibrate": Calibrate, "matrix": Matrix, "hidden": Hidden, "logits": Logits}


class Evaluation(_Part):
    """Evaluation on held-out text at the end of a run."""

    tokens: Annotated[int, Field(gt=0)] = 8192
    prompt: str | None = "The history of science is"
    new_tokens: Annotated[int, Field(ge=0)] = 48
    # the exam (docs/guides/evaluation.md): the longest documents of a text, one a sequence; 0: none
    exam_documents: Annotated[int, Field(ge=0)] = 4
    # tokens of each; None: 2,048 or the teacher's context, and no exam for a teacher with less than 512
    exam_tokens: Annotated[int, Field(ge=16)] | None = None
    exam_text: str = "embedded:held-out-wikipedia"

    def matches(self, recorded: Mapping[str, Any]) -> bool:
        """Whether an evaluation on record had these settings; those that an earlier version lacks are not compared."""
        return all(recorded.get(key, value) == value for key, value in self.model_dump(mode="json").items())


def is_stored(path: Path) -> bool:
    """Whether this recipe or study was written by a run or study, and not by a user."""
    siblings = ("manifest.json", "study.json", ".lock")
    return path.name in ("recipe.yaml", "study.yaml") and any((path.parent / name).exists() for name in siblings)


class Document(_Part):
    """A recipe as a YAML file: of a run (`Recipe`), or of a small teacher (`TeacherRecipe`)."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["recipe"]
    built_in: ClassVar[Path] = BUILT_IN  # folder of the recipes that come with Limbeck
    tagged: ClassVar[Mapping[str, type[_Stage]]] = STAGES  # stages by name
    data: Data = Data()

    def __init__(self, /, *args: Any, **values: Any) -> None:
        """Validate keyword arguments, the keys of the YAML file; raises LimbeckError for what is wrong with them."""
        name = type(self).__name__
        if args:
            raise LimbeckError(
                f"{name} takes its keys by name, not {args[0]!r}",
                expected=f'{name}(teacher="embedded", data={{"source": "corpus.jsonl"}}, ...)',
                hint=f'{name}.load("{args[0] if isinstance(args[0], str) else "quickstart"}")',
            )
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise format_validation_error(error, name, type(self), self.tagged) from error

    # pydantic then validates a file's values without this method, so that `parse` names the file in its errors
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.__signature__ = build_short_signature(cls)

    @classmethod
    def load(
        cls, source: str | Path = "limbeck", overrides: dict[str, Any] | None = None, *, stored: bool = False
    ) -> Self:
        """Load a built-in recipe by name, or a YAML file, and apply dotted overrides ("stages.hidden.lr": 1e-3).

        Args:
            stored: the file was written by a run, perhaps of an earlier version; always assumed in a run directory.

        Raises:
            LimbeckError: no such recipe, broken YAML, unknown key (with a suggestion) or invalid value.
        """
        path = Path(source) if Path(source).suffix in (".yaml", ".yml") else cls.built_in / f"{source}.yaml"
        if not path.is_file():
            built_in = sorted(p.stem for p in cls.built_in.glob("*.yaml"))
            raise LimbeckError(
                f"unknown recipe '{source}'{suggest_closest(str(source), built_in)}",
                expected=f"a YAML file, or one of: {', '.join(built_in)}",
            )
        raw = read_yaml(path, "recipe", "keys such as teacher, student, data, stages")
        if stored or is_stored(path):
            raw = from_old_keys(raw)
        for key, value in (overrides or {}).items():
            set_by_dotted_key(raw, key, value)
        return cls.parse(raw, str(source))

    @model_validator(mode="after")
    def _name_repeated_text(self) -> Self:
        object.__setattr__(self, "data", name_repeated_text(self.data, self.data))
        stages = getattr(self, "stages", [])
        for number, stage in enumerate(stages):
            if stage.data is not None:
                stages[number] = stage.model_copy(update={"data": name_repeated_text(stage.data, self.data)})
        return self

    @classmethod
    def parse(cls, raw: dict[str, Any], origin: str = "recipe") -> Self:
        """Validate plain values; raises LimbeckError instead of pydantic's error."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise format_validation_error(error, origin, cls, cls.tagged) from error

    def to_yaml(self) -> str:
        """Return the complete recipe as YAML, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def text_of(self, stage: _Stage) -> Data:
        """Return the text settings of a stage, with that stage's sequence length."""
        data = stage.data or self.data
        return data if stage.seq_len is None else data.model_copy(update={"seq_len": stage.seq_len})


class Recipe(Document):
    """All settings of a distillation run: teacher, student, text, stages, evaluation.

    A recipe is a YAML file in Python: `limbeck recipe quickstart` prints one with comments. It does not change once it
    is made, and an unknown key is refused with a suggestion.

    Example:
        >>> recipe = limbeck.Recipe.load("quickstart", {"student.mixer": "gla", "stages.hidden.tokens": 20_000})
        >>> recipe.student.mixer, recipe.stages[1].tokens
        ('gla', 20000)
        >>> recipe = limbeck.Recipe(
        ...     teacher="Qwen/Qwen3-0.6B",
        ...     student={"mixer": "mlstm"},
        ...     data={"source": "corpus.jsonl", "seq_len": 1024},
        ...     stages=[{"stage": "calibrate", "tokens": 65_536}, {"stage": "logits", "tokens": 1_000_000}],
        ... )
        >>> print(recipe.to_yaml())  # the whole recipe, defaults included
        data:
          source: corpus.jsonl
        ...
    """

    name: str = "custom"
    teacher: str = "embedded"
    teacher_bits: Literal[8, 4] | None = None  # quantize the teacher's linear layers; None: float32
    student: Student = Student()
    data: Data = Data()
    stages: list[StageRecipe] = []
    evaluation: Evaluation = Evaluation()
    # after each stage: put the weights from before it back if the student got worse on held-out text
    keep_better: bool = False
    seed: int = Field(0, ge=0, lt=2**62)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # dtype of matrix products (autocast); weights are float32. auto: bf16 or fp16 on a GPU, else fp32
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    tf32: bool = False  # TF32 for float32 products, on NVIDIA GPUs from Ampere on
    # torch.compile for blocks and losses; auto: on a GPU (docs/guides/gpu.md)
    compile: bool | Literal["auto"] = "auto"
    # how packed documents are separated on a GPU; auto: variable-length FlashAttention, where the family supports it;
    # mask: the attention masks of transformers
    attention: Literal["auto", "mask"] = "auto"
    backend: Literal["auto", "torch", "fla"] = "auto"  # of the operators; fla: an unsupported call is an error
    deterministic: bool = False  # bit-identical reruns on the same GPU; an error where impossible
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    save_total_limit: Annotated[int, Field(gt=0)] = 2  # checkpoints of the current stage
    # trackers beside metrics.jsonl; auto: TensorBoard if it is installed (docs/guides/training.md)
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] | Literal["auto"] = "auto"
    out: str | None = None

    @property
    def longest(self) -> int:
        """Longest sequence length of any stage, in tokens."""
        return max(text.seq_len for text in (self.data, *map(self.text_of, self.stages)))

    @property
    def guard_text(self) -> Data:
        """The text on whose held-out part `keep_better` judges a stage, in the longest sequences of any stage."""
        return self.data.model_copy(update={"seq_len": self.longest})


FORMAT = 2  # raise when the same recipe gives another teacher, because text, vocabulary, init or training changed


class NextTokenConfig(Trained):
    """Next-token prediction on text."""

    stage: Literal["next_token"]
    lr: Annotated[float, Field(gt=0)] = 3e-3


class RepeatsConfig(NextTokenConfig):
    """Next-token prediction on repeated sequences of random tokens (`limbeck.data.synthetic`), before any text."""

    stage: Literal["repeats"]  # type: ignore[assignment]


class TeacherRecipe(Document):
    """All settings of a small teacher that Limbeck pretrains."""

    built_in: ClassVar[Path] = BUILT_IN / "teachers"
    tagged: ClassVar[Mapping[str, type[Trained]]] = {"repeats": RepeatsConfig, "next_token": NextTokenConfig}

    name: str
    model: dict[str, Any]  # fields of the transformers config, including `model_type`
    init: Literal["random", "look_back"] = "random"  # initial weights, see `limbeck.training.induction_init`
    vocab_size: Annotated[int, Field(ge=300)]  # of the byte-level BPE, including special tokens
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
        """Hash of all settings that the weights depend on."""
        settings = self.model_dump(mode="json", exclude={"name", "checkpoint_seconds", "save_total_limit", "trackers"})
        for data in (settings["data"], *(stage["data"] for stage in settings["stages"] if stage["data"])):
            if data["documents"] == "packed":  # a key that teachers in a cache did not have
                del data["documents"]
        # over the original key names, so that teachers in a cache stay valid
        return hashlib.sha256(json.dumps([FORMAT, to_old_keys(settings)], sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        """Folder of the trained teacher in the cache, whether it exists yet or not."""
        return cache_root() / "assets" / f"teacher-{self.name}-{self.key[:12]}"

    @classmethod
    def names(cls) -> list[str]:
        """List the teachers that come with Limbeck."""
        return sorted(path.stem for path in cls.built_in.glob("*.yaml"))


AnyRecipe = Recipe | TeacherRecipe  # recipe of a run directory
