"""Settings of the stages: the three of MOHAWK, the one that solves a least squares, and those of a small teacher.

    STAGES["hidden"]                                       # Hidden
    Hidden(stage="hidden", tokens=20_000, lr=1e-3).loss    # "relative"

Each class is one stage, and its defaults hold for every recipe. What the stages compute is in `limbeck.training`:
`calibration`, `alignment` (matrix and hidden), `logit_distillation`, and `pretraining` for a small teacher's.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from limbeck.core.config import Part
from limbeck.core.objectives import Objectives
from limbeck.core.old_keys import OLD_KEYS
from limbeck.core.text_settings import Count, Data


class StageSettings(Part):
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


class Calibrate(StageSettings):
    """Stage 0: solve for the output projections by least squares, without gradients."""

    stage: Literal["calibrate"]
    """Stage 0: output projections by least squares."""
    ridge: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Ridge of the least squares, as a share of the mean diagonal of the Gram matrix; `auto`: of several
    the one with the lowest loss on the sequences that follow.
    """
    weight: Literal["none", "inverse_norm"] = "none"
    """Weight of each token in the least squares: the same for all, or one over the norm of its target."""


class Trained(StageSettings):
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


StageRecipe = Annotated[Calibrate | Matrix | Hidden | Logits, Field(discriminator="stage")]
STAGES: dict[str, type[StageSettings]] = {"calibrate": Calibrate, "matrix": Matrix, "hidden": Hidden, "logits": Logits}
