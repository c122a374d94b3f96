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
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from limbeck.core.config import (
    Part,
    build_short_signature,
    format_validation_error,
    read_yaml,
    set_by_dotted_key,
)
from limbeck.core.counts import parse_count
from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.core.objectives import Objectives
from limbeck.core.old_keys import OLD_KEYS, from_old_keys, to_old_keys
from limbeck.core.repeated_text import has_repeated_text, name_repeated_text
from limbeck.core.storage import cache_root

BUILT_IN = Path(__file__).parent / "recipes"


def _as_text(value: Any) -> Any:
    """Accept a single layer's number, as YAML reads `softmax_layers: 3`, as well as "3"."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Layers = Annotated[str | list[int], BeforeValidator(_as_text)]


def _read_count(value: Any) -> Any:
    """Read a count of tokens as people write it, 20M; leave any other text to be refused with its key's name."""
    try:
        return parse_count(value)
    except LimbeckError:
        return value


Count = Annotated[int, BeforeValidator(_read_count)]


def _refuse_numbers(value: Any) -> Any:
    """Refuse the name of a group that YAML reads as a number: 18.2 and 18.20 are two groups and one number."""
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, float) or (isinstance(name, int) and isinstance(value, list)):
            raise ValueError(f'{name} is a number; quote groups of heads, as in ["18.2", "20.0"]')
    return value


HeadGroupNames = Annotated[Annotated[int, Field(ge=1)] | str | list[str], BeforeValidator(_refuse_numbers)]


class Rule(Part):
    """A different mixer for some of the layers."""

    layers: Layers
    """The layers that this rule is for: numbers and ranges, `0-2,5`."""
    mixer: str | None = None
    """Their mixer; null: the student's."""
    preset: Literal["default", "published", "controlled"] | None = None
    """Defaults of the mixer's options; null: the student's preset."""
    options: dict[str, Any] = {}
    """Options of the mixer, by name."""


class Student(Part):
    """Which mixer replaces attention in which layers, and how it is initialized."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["student"]
    mixer: str = "gated_deltanet"
    """What replaces attention: a name that `limbeck students` lists, or a Python file."""
    layers: Layers = "all"
    """The layers that are converted: `all`, or numbers and ranges, `10-29`."""
    preset: Literal["default", "published", "controlled"] = "default"
    """Defaults of the mixer's options: Limbeck's, its authors', or the same for all mixers but for the recurrence."""
    options: dict[str, Any] = {}
    """Options of the mixer, by name (`limbeck students NAME --options`)."""
    softmax_layers: Layers = "none"
    """Layers that keep softmax attention: none, numbers, "every 4", "uniform 7", or a file written by
    `limbeck select`.
    """
    softmax_heads: HeadGroupNames = "none"
    """Groups of heads that keep softmax in converted layers: none, layer.group as in ["18.2", "20.0"], a file written
    by `limbeck select --heads`, or a number: so many are chosen so at the start of the run.
    """
    softmax_window: Annotated[int, Field(ge=0)] = 0
    """Tokens that those groups see, besides the first four, so that their memory does not grow; 0 for all."""
    rules: list[Rule] = []
    """Other mixers for some of the layers; later rules override earlier ones."""
    copy_projections: bool = True
    """Start from the teacher's q, k, v and output projections; false: from random ones."""


class Source(Part):
    """One of several sources of text."""

    source: str
    """As `data.source`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share of the sequences is this weight / the sum of all weights."""
    text_field: str = "text"
    """The field of a record that holds the text."""
    chat: bool | None = None
    """Whether records are conversations; null: detected by a field `messages`."""


class Data(Part):
    """The text: where it comes from and how it is cut into sequences (docs/guides/data.md)."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["data"]
    source: str = "embedded"
    """A file, a folder, a dataset of the Hub (`owner/name`), or `embedded`: the text that comes with Limbeck."""
    sources: Annotated[list[Source], Field(min_length=1)] | None = None
    """Instead of `source`: several, by weight."""
    text_field: str = "text"
    """The field of a record that holds the text."""
    chat: bool | None = None
    """Records are conversations and only answers are targets; null: detected by a field `messages`."""
    seq_len: Annotated[Count, Field(ge=16)] = 512
    """Tokens in a sequence."""
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Share of the documents reserved for evaluation."""
    max_tokens: Annotated[Count, Field(gt=0)] | None = None
    """Tokenize at most so many tokens of each source; null: all."""
    documents: Literal["packed", "whole"] = "packed"
    """`packed`: documents fill the sequences one after the other; `whole`: each sequence is the beginning of one
    document of at least `seq_len` tokens.
    """
    streaming: bool = False
    """Tokenize shard by shard during training, not everything first."""
    cache_gb: Annotated[float, Field(gt=0)] = 20.0
    """With streaming: disk space for tokens, in GB."""

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


class _Stage(Part):
    """Settings that all stages share."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["stage"]
    tokens: Annotated[Count, Field(gt=0)]
    """Tokens that the stage reads; a text that is shorter is read again."""
    seq_len: Annotated[Count, Field(ge=16)] | None = None
    """Tokens in a sequence; null: as in the recipe's `data`."""
    data: Data | None = None
    """A text for this stage alone; null: the recipe's."""
    batch_size: Annotated[int, Field(gt=0)] = 4
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: Annotated[int, Field(gt=0)] | None = None
    """Sequences per forward pass; null: the whole batch."""


class Calibrate(_Stage):
    """Stage 0: solve for the output projections by least squares, without gradients."""

    stage: Literal["calibrate"]
    """Stage 0: output projections by least squares."""
    ridge: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Ridge of the least squares, as a share of the mean diagonal of the Gram matrix; `auto`: of several
    the one with the lowest loss on the sequences that follow.
    """
    weight: Literal["none", "inverse_norm"] = "none"
    """Weight of each token in the least squares: the same for all, or one over the norm of its target."""


class Trained(_Stage):
    """Settings of a stage that trains by gradient descent."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the learning rate rises."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate / peak learning rate."""
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the learning rate falls. `wsd` stays at the peak, then falls as one minus the square root (arXiv
    2405.18392).
    """
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """With wsd: share of the steps, at the end, in which the learning rate decays."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: for the teacher's matrices; the mixers' parameters use AdamW."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """On the teacher's matrices, not on a mixer's own parameters, norms and biases."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm: all together in stage 3, layer by layer in stages 1 and 2."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The result is the running average of the weights with this decay per step; null: the last weights."""
    eval_steps: Annotated[int, Field(gt=0)] | None = None
    """Steps between evaluations on held-out text; null: none."""
    eval_sequences: Annotated[int, Field(gt=0)] = 8
    """Held-out sequences of such an evaluation."""
    patience: Annotated[int, Field(gt=0)] | None = None
    """Stop after so many evaluations without a lower loss, and keep the best weights; null: never."""

    @model_validator(mode="after")
    def _check_patience(self) -> "Trained":
        if self.patience and not self.eval_steps:
            raise ValueError("patience counts evaluations on held-out text, so it requires eval_steps")
        return self


class EarlyStopping(Part):
    """Per-layer early stopping in stages 1 and 2: a converged layer is skipped in later steps."""

    patience: Annotated[int, Field(gt=0)] = 50
    """Steps without a lower running mean of the layer's loss."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Relative decrease that counts as lower."""


class Matrix(Trained):
    """Stage 1: match mixing matrices to the teacher's attention matrices."""

    stage: Literal["matrix"]
    """Stage 1: mixing matrices against the teacher's attention matrices (MOHAWK, arXiv 2408.10189, eq. 1)."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    micro_batch_size: Annotated[int, Field(gt=0)] | None = 1
    """Sequences per forward pass. The [T, T] matrices of one at a time take the least memory, and are the
    fastest too.
    """
    sampled_queries: Annotated[int, Field(gt=0)] | None = 64
    """Number of queries, that is rows of each matrix, that are compared, drawn anew for each sequence; null:
    all."""
    layer_early_stopping: EarlyStopping | None = None
    """When a layer counts as converged and is skipped; null: every layer trains to the end."""


class Hidden(Trained):
    """Stage 2: match each layer's output to the teacher's, on the teacher's input."""

    stage: Literal["hidden"]
    """Stage 2: the output of each layer against the teacher's."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    target: Literal["attention", "block"] = "attention"
    """Compare the output of the attention, or of the whole block."""
    loss: Literal["l2", "relative", "mse", "cosine"] = "relative"
    """Of student output y and teacher output t, mean over tokens: `l2` ‖y − t‖ (MOHAWK, eq. 2), `relative` ‖y −
    t‖²/‖t‖², `mse` ‖y − t‖²/D (LoLCATs, arXiv 2410.10254, eq. 7), `cosine` 1 − cos(y, t).
    """
    train: Literal["mixer", "attention", "block"] = "attention"
    """Trained weights: only the mixer's new parameters, all of the attention, or the block."""
    layer_early_stopping: EarlyStopping | None = None
    """When a layer counts as converged and is skipped; null: every layer trains to the end."""


class Lora(Part):
    """Low-rank adapters on linear layers, merged into the weights at the end of the stage (docs/guides/training.md)."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["lora"]
    rank: Annotated[int, Field(gt=0)] = 8
    """Rank of each adapter."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The adapter's output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "attention"
    """`attention`: linear layers of the converted attention; `all-linear`: those of the backbone; or a list of name
    suffixes.
    """


class Logits(Trained):
    """Stage 3: train the whole student on the teacher's logits and on labels."""

    stage: Literal["logits"]
    """Stage 3: the whole student against labels and the teacher's logits."""
    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate of the converted attention."""
    lr_other: Annotated[float, Field(ge=0)] | None = None
    """Peak learning rate outside the converted attention; null: a fifth of `lr`."""
    batch_size: Annotated[int, Field(gt=0)] = 1
    """Sequences per optimizer step, over all processes."""
    train: Literal["attention", "body", "all", "lora"] = "body"
    """Trained weights: the converted attention; `body`: everything but embeddings and head; all; `lora`: adapters on
    linear layers, and all mixer parameters.
    """
    lora: Lora | None = None
    """Settings of the adapters; if set, adapters train instead of the body."""
    ce: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy on the labels."""
    kl: Annotated[float, Field(ge=0)] = 1.0
    """Weight of τ² KL(teacher ‖ student) (Hinton et al., arXiv 1503.02531)."""
    reverse_kl: Annotated[float, Field(ge=0)] = 0.0
    """Weight of τ² KL(student ‖ teacher) (MiniLLM, arXiv 2306.08543, token by token)."""
    jsd: Annotated[float, Field(ge=0)] = 0.0
    """Weight of τ² times the generalized Jensen-Shannon divergence (GKD, arXiv 2306.13649)."""
    top_kl: Annotated[float, Field(ge=0)] = 0.0
    """Weight of τ² KL over the teacher's `top_k` most likely tokens and all others as one."""
    enhanced: Annotated[float, Field(ge=0)] = 0.0
    """Weight of τ² times the cross-entropy on the teacher's distribution with the label's part raised by `gamma`
    (OFA-KD, arXiv 2310.19444).
    """
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """The temperature τ of both distributions; `ce` is at 1."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """With jsd: the teacher's share of the mixture."""
    top_k: Annotated[int, Field(gt=0)] = 32
    """With top_kl: number of the teacher's most likely tokens."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """With enhanced: the exponent of the label's part, (1 + q)^γ."""
    objectives: Objectives = Objectives()
    """Further objectives, of neighboring systems (docs/guides/objectives.md)."""
    chunk_size: Annotated[int, Field(gt=0)] | None = None
    """Tokens whose logits exist at once; null: 128 on a CPU, on a GPU as many as make half a gigabyte of them."""
    cache_teacher: Literal["top-k"] | None = None
    """"top-k": the teacher's `top_k` most likely tokens at each position of the stage's text are computed once and then
    read from the cache, by this and later runs; with top_kl and ce.
    """
    checkpoint_activations: bool = False
    """Recompute blocks in the backward pass: less memory, more time."""
    sharding: Literal["none", "full"] = "none"
    """`full`: shard every block's weights and optimizer state over the processes (FSDP2)."""

    @model_validator(mode="after")
    def _check_losses(self) -> "Logits":
        needs_all = self.kl or self.reverse_kl or self.jsd or self.enhanced  # of the teacher's logits
        if not any((self.ce, needs_all, self.top_kl)):
            raise ValueError("at least one of ce, kl, reverse_kl, jsd, top_kl and enhanced has to be greater than 0")
        if self.cache_teacher and (needs_all or self.temperature != 1):
            raise ValueError(
                "cache_teacher has only the teacher's most likely tokens, so it supports top_kl and ce at temperature 1"
                " (--set stages.N.kl=0 --set stages.N.top_kl=1 --set stages.N.top_k=64)"
            )
        changing = [name for name in self.objectives.changes_teacher if name in self.objectives.active()]
        if changing and not (needs_all or self.top_kl):
            listeners = "kl, reverse_kl, jsd, top_kl and enhanced"
            raise ValueError(f"{changing[0]} changes what the teacher says, so one of {listeners} has to be above 0")
        if self.objectives.active() and (self.cache_teacher or self.sharding == "full"):
            other = "cache_teacher, which runs no teacher" if self.cache_teacher else "sharding: full"
            raise ValueError(f"objectives need whole passes of both models, so they cannot be combined with {other}")
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


class Evaluation(Part):
    """Evaluation on held-out text at the end of a run."""

    tokens: Annotated[Count, Field(gt=0)] = 8192
    """Held-out tokens on which student and teacher are compared."""
    prompt: str | None = "The history of science is"
    """Text that teacher and student continue; null: none."""
    new_tokens: Annotated[int, Field(ge=0)] = 48
    """Tokens of that continuation."""
    exam_documents: Annotated[int, Field(ge=0)] = 4
    """The exam: so many of the longest documents of a text, each alone in its sequence; 0: none."""
    exam_tokens: Annotated[Count, Field(ge=16)] | None = None
    """Tokens of each; null: 2,048 or the teacher's context, and no exam for a teacher with less than 512."""
    exam_text: str = "embedded:held-out-wikipedia"
    """The exam's text, a source as in `data.source`."""

    def matches(self, recorded: Mapping[str, Any]) -> bool:
        """Whether an evaluation on record had these settings; those that an earlier version lacks are not compared."""
        return all(recorded.get(key, value) == value for key, value in self.model_dump(mode="json").items())


def is_stored(path: Path) -> bool:
    """Whether this recipe or study was written by a run or study, and not by a user."""
    siblings = ("manifest.json", "study.json", ".lock")
    return path.name in ("recipe.yaml", "study.yaml") and any((path.parent / name).exists() for name in siblings)


class Document(Part):
    """A recipe as a YAML file: of a run (`Recipe`), or of a small teacher (`TeacherRecipe`)."""

    renamed: ClassVar[Mapping[str, str]] = OLD_KEYS["recipe"]
    built_in: ClassVar[Path] = BUILT_IN  # folder of the recipes that come with Limbeck
    tagged: ClassVar[Mapping[str, type[_Stage]]] = STAGES  # stages by name
    data: Data = Data()
    """The text that the stages train on."""

    def __init__(self, /, *args: Any, **values: Any) -> None:
        """Validate keyword arguments, the keys of the YAML file; raises LimbeckError for what is wrong with them."""
        name = type(self).__name__
        if args:
            raise LimbeckError(
                f"{name} takes its keys by name, not {args[0]!r}",
                expected=f'{name}(teacher="embedded", data={{"source": "corpus.jsonl"}}, ...)',
                hint=f'{name}.load("{args[0] if isinstance(args[0], str) else "quickstart"}")',
            )
        super().__init__(**values)

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
    """Name of the recipe; run directories are called after it."""
    teacher: str = "embedded"
    """A folder, a model of the Hub (`owner/name`, `owner/name@revision`), `embedded`, or a small teacher (`small`,
    `tiny`).
    """
    teacher_bits: Literal[8, 4] | None = None
    """Quantize the teacher's linear layers to so many bits; null: float32."""
    student: Student = Student()
    """Which mixer replaces attention in which layers, and how it starts."""
    data: Data = Data()
    """The text that the stages train on, unless a stage has its own."""
    stages: list[StageRecipe] = []
    """The stages, in the order in which they run."""
    evaluation: Evaluation = Evaluation()
    """Evaluation on held-out text at the end of the run."""
    keep_better: bool = False
    """After each stage: put the weights from before it back if the student got worse on held-out text."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Seed of everything random: initial weights, the order of the text, dropout, sampling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto`: a CUDA GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of matrix products (autocast); weights are float32. auto: bf16 or fp16 on a GPU, else fp32."""
    tf32: bool = False
    """TF32 for float32 products, on NVIDIA GPUs from Ampere on."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile for blocks and losses of stage 3; auto: on a GPU."""
    attention: Literal["auto", "mask"] = "auto"
    """How packed documents are separated on a GPU; auto: variable-length FlashAttention, where the family supports it;
    mask: the attention masks of transformers.
    """
    backend: Literal["auto", "torch", "fla"] = "auto"
    """Of the operators: kernels of flash-linear-attention or PyTorch; `fla`: an unsupported call is an error."""
    deterministic: bool = False
    """Bit-identical reruns on the same GPU; an error where impossible."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between checkpoints."""
    save_total_limit: Annotated[int, Field(gt=0)] = 2
    """Checkpoints of the current stage that are kept."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] | Literal["auto"] = "auto"
    """Trackers beside metrics.jsonl; auto: TensorBoard if it is installed."""
    out: str | None = None
    """The run directory; null: the first of `runs/NAME`, `runs/NAME-2`, ... that is free or holds this same run."""

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
    """Next-token prediction on text."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate."""


class RepeatsConfig(NextTokenConfig):
    """Next-token prediction on repeated sequences of random tokens (`limbeck.data.synthetic`), before any text."""

    stage: Literal["repeats"]  # type: ignore[assignment]
    """Next-token prediction on repeated sequences of random tokens."""


class TeacherRecipe(Document):
    """All settings of a small teacher that Limbeck pretrains."""

    built_in: ClassVar[Path] = BUILT_IN / "teachers"
    tagged: ClassVar[Mapping[str, type[Trained]]] = {"repeats": RepeatsConfig, "next_token": NextTokenConfig}

    name: str
    """Name of the teacher, as in `--teacher NAME`."""
    model: dict[str, Any]
    """Fields of the transformers config, including `model_type`."""
    init: Literal["random", "look_back"] = "random"
    """Initial weights: random, or with approximate induction heads."""
    vocab_size: Annotated[int, Field(ge=300)]
    """Of the byte-level BPE, including special tokens."""
    data: Data
    """The text that it is trained on."""
    stages: Annotated[
        list[Annotated[NextTokenConfig | RepeatsConfig, Field(discriminator="stage")]], Field(min_length=1)
    ]
    """Its stages, in order."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Seed of everything random."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between checkpoints."""
    save_total_limit: Annotated[int, Field(gt=0)] = 2
    """Checkpoints of the current stage that are kept."""
    trackers: list[str] = []
    """Trackers beside metrics.jsonl."""

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
