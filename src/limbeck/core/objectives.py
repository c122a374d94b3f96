"""Settings of the further objectives of stage 3: signals of neighboring distillation systems, all off by default.

    stages:
      - stage: logits
        objectives:
          on_policy: {share: 0.5, divergence: reverse}
          gram: {weight: 0.1}

What each one computes is in `limbeck.training.objectives`, in a module of its name; docs/guides/objectives.md compares
them.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from limbeck.core.config import Layers, Part

Weight = Annotated[float, Field(gt=0)]


class OnPolicy(Part):
    """The student continues prompts from the text, and is compared with its teacher on what it wrote (MiniLLM, GKD)."""

    weight: Weight = 1.0
    """Factor on the divergence in the loss."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the sequences, which are continued instead of read."""
    divergence: Literal["forward", "reverse", "jsd"] = "reverse"
    """KL(teacher ‖ student), KL(student ‖ teacher), or the generalized Jensen-Shannon divergence."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """With jsd: the teacher's share of the mixture."""
    new_tokens: Annotated[int, Field(gt=0)] = 64
    """Tokens that the student writes; the rest of the sequence is the prompt."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the sampling."""


class Gram(Part):
    """Angles between the tokens of a document, in the student as in the teacher (EmbedDistill)."""

    weight: Weight = 1.0
    """Factor on the distance in the loss."""
    blocks: Layers = "uniform 4"
    """Blocks whose outputs are compared: `all`, `uniform 4` (all of fewer), `every 4`, numbers."""
    chunk: Annotated[int, Field(ge=2)] = 64
    """Tokens of a document that are compared with each other."""


class Features(Part):
    """Outputs of several blocks through learned maps, against the teacher's (feature alignment)."""

    weight: Weight = 1.0
    """Factor on the distance in the loss."""
    blocks: Layers = "uniform 4"
    """Blocks whose outputs are compared, as of gram."""
    block_weights: list[Weight] | None = None
    """One for each of the blocks, whatever their sum; null: equal ones."""
    loss: Literal["l2", "relative", "mse", "cosine"] = "relative"
    """The distance, as in stage 2."""
    maps: Literal["linear", "none"] = "linear"
    """`linear`: a matrix a block, which starts as the identity."""
    lr: Weight | None = None
    """Peak learning rate of the maps; null: the stage's."""


class Exits(Part):
    """Predictions from the middle of the student, against the teacher's with the label enhanced (OFA-KD)."""

    weight: Weight = 0.3
    """Factor in the loss."""
    blocks: Layers = "uniform 2"
    """Blocks that exits lead from, as of gram."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """Exponent of the enhancement."""
    lr: Weight | None = None
    """Peak learning rate of the exits' maps; null: the stage's."""


class AdaptedFeatures(Part):
    """Outputs of several blocks against the teacher's, which adapt to the student (FOFA)."""

    weight: Weight = 1.0
    """Factor on the distance in the loss."""
    blocks: Layers = "uniform 4"
    """Blocks whose outputs are compared, as of gram."""
    rank: Annotated[int, Field(gt=0)] = 8
    """Rank of the prompts that adapt the teacher's outputs."""
    stay: Annotated[float, Field(ge=0)] = 1.0
    """Weight of how far these move from the teacher's own."""
    lr: Weight | None = None
    """Peak learning rate of the prompts; null: the stage's."""


class OnlineTeacher(Part):
    """Small modules in the teacher that learn along with the student (online distillation)."""

    blocks: Layers = "uniform 4"
    """Blocks with a module behind each, as of gram."""
    rank: Annotated[int, Field(gt=0)] = 8
    """Rank of the modules."""
    ce: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy in what the modules learn from."""
    kl: Annotated[float, Field(ge=0)] = 1.0
    """Weight of KL(student ‖ teacher) in what the modules learn from."""
    lr: Weight | None = None
    """Peak learning rate of the modules; null: the stage's."""


class StochasticTeacher(Part):
    """Several passes of the teacher with dropout, weighted by how near they are to the student (SSD)."""

    passes: Annotated[int, Field(gt=0)] = 4
    """Passes with dropout, beside the one without."""
    dropout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share that is dropped of what each block adds."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Temperature of the weights; the smaller, the more the nearest pass counts."""


class Teachers(Part):
    """Further teachers with the same tokenizer beside the recipe's (reinforced multi-teacher selection)."""

    names: Annotated[list[str], Field(min_length=1)]
    """Their folders or names, as `teacher`."""
    rule: Literal["reinforce", "best", "average"] = "reinforce"
    """`reinforce`: a small policy selects teachers for each sequence and learns from the student's gain on held-out
    text; `best`: the one with the lowest loss on the sequence; `average`: all alike.
    """
    reward_sequences: Annotated[int, Field(gt=0)] = 1
    """Held-out sequences that the gain is measured on in each step."""
    lr: Weight | None = 0.05
    """Peak learning rate of the policy; null: the stage's."""


class Objectives(Part):
    """The further objectives of stage 3; null leaves one out."""

    changes_teacher: ClassVar[tuple[str, ...]] = ("online_teacher", "stochastic_teacher", "teachers")
    on_policy: OnPolicy | None = None
    """A divergence on what the student writes itself (MiniLLM, arXiv 2306.08543; GKD, arXiv 2306.13649)."""
    gram: Gram | None = None
    """Angles between the tokens of a document (EmbedDistill, arXiv 2301.12005)."""
    features: Features | None = None
    """Outputs of several blocks through learned maps (feature alignment, arXiv 2412.19449)."""
    exits: Exits | None = None
    """Predictions from the middle of the student (OFA-KD, arXiv 2310.19444)."""
    adapted_features: AdaptedFeatures | None = None
    """Outputs of several blocks, the teacher's adapted by low-rank prompts (FOFA, arXiv 2501.08885)."""
    online_teacher: OnlineTeacher | None = None
    """Small modules in the teacher that learn along (online distillation, arXiv 2409.12512)."""
    stochastic_teacher: StochasticTeacher | None = None
    """Several passes of the teacher with dropout (SSD, arXiv 2504.14307)."""
    teachers: Teachers | None = None
    """Several teachers, selected for each sequence (reinforced selection, arXiv 2012.06048)."""

    @model_validator(mode="after")
    def _check_one_teacher(self) -> "Objectives":
        changing = [name for name in self.changes_teacher if name in self.active()]
        if len(changing) > 1:
            raise ValueError(f"{' and '.join(changing)} each change what the teacher says; set one of them")
        return self

    def active(self) -> dict[str, Part]:
        """Return the settings of those that are set, by name."""
        return {name: settings for name in type(self).model_fields if (settings := getattr(self, name)) is not None}
