"""Settings of the further objectives of stage 3: signals of neighboring distillation systems, all off by default.

    stages:
      - stage: logits
        objectives:
          on_policy: {share: 0.5, divergence: reverse}
          gram: {weight: 0.1}

What each one computes is in `limbeck.training.objectives`, in a module of its name; docs/objectives.md compares them.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from limbeck.core.config import Part

Weight = Annotated[float, Field(gt=0)]
Blocks = str | list[int]


class OnPolicy(Part):
    """The student continues prompts from the text, and is compared with its teacher on what it wrote (MiniLLM, GKD)."""

    weight: Weight = 1.0
    share: Annotated[float, Field(gt=0, le=1)] = 0.5  # of the sequences, which are continued instead of read
    divergence: Literal["forward", "reverse", "jsd"] = "reverse"  # KL(teacher || student), KL(student || teacher)
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of jsd: the teacher's share of the mixture
    new_tokens: Annotated[int, Field(gt=0)] = 64  # that the student writes; the rest of the sequence is the prompt
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of the sampling


class Gram(Part):
    """Angles between the tokens of a document, in the student as in the teacher (EmbedDistill)."""

    weight: Weight = 1.0
    blocks: Blocks = "uniform 4"  # whose outputs are compared: "all", "uniform 4", "every 4", numbers
    chunk: Annotated[int, Field(ge=2)] = 64  # tokens of a document that are compared with each other


class Features(Part):
    """Outputs of several blocks through learned maps, against the teacher's (feature alignment)."""

    weight: Weight = 1.0
    blocks: Blocks = "uniform 4"  # as of gram
    block_weights: list[Weight] | None = None  # one for each of the blocks; null: equal ones
    loss: Literal["l2", "relative", "mse", "cosine"] = "relative"  # as in stage 2
    maps: Literal["linear", "none"] = "linear"  # linear: a matrix a block, which starts as the identity
    lr: Weight | None = None  # peak learning rate of the maps; null: the stage's


class Exits(Part):
    """Predictions from the middle of the student, against the teacher's with the label enhanced (OFA-KD)."""

    weight: Weight = 0.3
    blocks: Blocks = "uniform 2"  # that exits lead from, as of gram
    gamma: Annotated[float, Field(ge=0)] = 1.0  # exponent of the enhancement
    lr: Weight | None = None  # of the exits' maps; null: the stage's


class AdaptedFeatures(Part):
    """Outputs of several blocks against the teacher's, which adapt to the student (FOFA)."""

    weight: Weight = 1.0
    blocks: Blocks = "uniform 4"  # as of gram
    rank: Annotated[int, Field(gt=0)] = 8  # of the prompts that adapt the teacher's outputs
    stay: Annotated[float, Field(ge=0)] = 1.0  # weight of how far they move from the teacher's own
    lr: Weight | None = None  # of the prompts; null: the stage's


class OnlineTeacher(Part):
    """Small modules in the teacher that learn along with the student (online distillation)."""

    blocks: Blocks = "uniform 4"  # with a module behind each, as of gram
    rank: Annotated[int, Field(gt=0)] = 8
    ce: Annotated[float, Field(ge=0)] = 1.0  # weight of the cross-entropy in what the modules learn from
    kl: Annotated[float, Field(ge=0)] = 1.0  # of KL(student || teacher) in it
    lr: Weight | None = None  # of the modules; null: the stage's


class StochasticTeacher(Part):
    """Several passes of the teacher with dropout, weighted by how near they are to the student (SSD)."""

    passes: Annotated[int, Field(gt=0)] = 4  # with dropout, beside the one without
    dropout: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of what each block adds
    temperature: Annotated[float, Field(gt=0)] = 0.1  # of the weights; the smaller, the more the nearest pass counts


class Teachers(Part):
    """Further teachers with the same tokenizer beside the recipe's (reinforced multi-teacher selection)."""

    names: Annotated[list[str], Field(min_length=1)]  # folders or names, as `teacher`
    # reinforce: a small policy selects teachers for each sequence and learns from the student's gain on held-out text;
    # best: the one with the lowest loss on the sequence; average: all alike
    rule: Literal["reinforce", "best", "average"] = "reinforce"
    reward_sequences: Annotated[int, Field(gt=0)] = 1  # held-out sequences that the gain is measured on in each step
    lr: Weight | None = 0.05  # of the policy; null: the stage's


class Objectives(Part):
    """The further objectives of stage 3; null leaves one out."""

    changes_teacher: ClassVar[tuple[str, ...]] = ("online_teacher", "stochastic_teacher", "teachers")
    on_policy: OnPolicy | None = None
    gram: Gram | None = None
    features: Features | None = None
    exits: Exits | None = None
    adapted_features: AdaptedFeatures | None = None
    online_teacher: OnlineTeacher | None = None
    stochastic_teacher: StochasticTeacher | None = None
    teachers: Teachers | None = None

    @model_validator(mode="after")
    def _check_one_teacher(self) -> "Objectives":
        changing = [name for name in self.changes_teacher if name in self.active()]
        if len(changing) > 1:
            raise ValueError(f"{' and '.join(changing)} each change what the teacher says; set one of them")
        return self

    def active(self) -> dict[str, Part]:
        """Return the settings of those that are set, by name."""
        return {name: settings for name in type(self).model_fields if (settings := getattr(self, name)) is not None}
