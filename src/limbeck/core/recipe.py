"""Recipes: all settings of a distillation run, or of a small teacher's pretraining, typed and validated.

    recipe = Recipe.load("quickstart", overrides={"student.mixer": "gla", "stages.hidden.tokens": 20_000})
    Recipe(teacher="Qwen/Qwen3-0.6B", data={"source": "corpus.jsonl"}, out="runs/qwen")
    Recipe.load("runs/qwen/recipe.yaml", stored=True)      # may have the key names of an earlier version
    TeacherRecipe.load("small").key                        # hex: identifies the teacher by its settings

Unknown keys are refused with a suggestion. A run directory stores its recipe with all defaults, so that the run can be
repeated from that file alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from limbeck.core.config import (
    Layers,
    Part,
    build_short_signature,
    format_validation_error,
    read_yaml,
    set_by_dotted_key,
)
from limbeck.core.digests import digest_facts
from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.core.old_keys import OLD_KEYS, from_old_keys, to_old_keys
from limbeck.core.repeated_text import name_repeated_text
from limbeck.core.stage_settings import STAGES, NextTokenConfig, RepeatsConfig, StageRecipe, StageSettings, Trained
from limbeck.core.storage import cache_root
from limbeck.core.text_settings import Count, Data

BUILT_IN = Path(__file__).parent / "recipes"


def _refuse_numbers(value: Any) -> Any:
    """Refuse the name of a group that YAML reads as a number: 18.2 and 18.20 are two groups and one number."""
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, float) or (isinstance(name, int) and isinstance(value, list)):
            raise ValueError(f'{name} is a number; quote groups of heads, as in ["18.2", "20.0"]')
    return value


def _refuse_paths(name: str) -> str:
    """Refuse a name that would be another folder than one in runs/."""
    if not name.strip() or name in (".", "..") or not name.isprintable() or set(name) & set("/\\"):
        raise ValueError("a name is that of a folder in runs/, without slashes; out (--out) takes a path")
    return name


RunName = Annotated[str, AfterValidator(_refuse_paths)]
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

    def collect_placement(self) -> dict[str, Any]:
        """Return which mixer goes into which layers, as keyword arguments of `convert` and `assign_mixers`."""
        rules = [rule.model_dump(exclude_none=True) for rule in self.rules]
        return {**self.model_dump(exclude={"copy_projections", "rules"}), "rules": rules}


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
    tagged: ClassVar[Mapping[str, type[StageSettings]]] = STAGES  # stages by name
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

    def text_of(self, stage: StageSettings) -> Data:
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

    name: RunName = "custom"
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


class TeacherRecipe(Document):
    """All settings of a small teacher that Limbeck pretrains."""

    built_in: ClassVar[Path] = BUILT_IN / "teachers"
    tagged: ClassVar[Mapping[str, type[Trained]]] = {"repeats": RepeatsConfig, "next_token": NextTokenConfig}

    name: RunName
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
        return digest_facts([FORMAT, to_old_keys(settings)])

    @property
    def folder(self) -> Path:
        """Folder of the trained teacher in the cache, whether it exists yet or not."""
        return cache_root() / "assets" / f"teacher-{self.name}-{self.key[:12]}"

    @classmethod
    def names(cls) -> list[str]:
        """List the teachers that come with Limbeck."""
        return sorted(path.stem for path in cls.built_in.glob("*.yaml"))


AnyRecipe = Recipe | TeacherRecipe  # recipe of a run directory
