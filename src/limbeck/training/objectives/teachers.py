"""Several teachers: a small policy selects among them for each sequence, by what the student gains on held-out text.

    stages.logits.objectives.teachers: {names: [small, runs/other-teacher], rule: reinforce}

The recipe's teacher and the named ones, all with its tokenizer, read each sequence x. With f_k what the policy sees of
teacher k on x (its loss, the student's loss, KL(teacher ‖ student), in nats a token),

    π_k = σ(θ · f_k + b_k),    a_k ~ Bernoulli(π_k),    q = mean of the selected teachers' probabilities

(of all of them, if none is selected), and q stands in for the teacher in all objectives. REINFORCE: the reward R of a
step is how much the student's loss on held-out sequences fell over it, and the policy ascends

    (R - running mean of R) · mean over x of ∇ Σ_k log π_k(a_k)

Source: reinforced multi-teacher selection (arXiv 2012.06048), whose state is the input with the teachers' outputs and
losses, and whose rewards are the student's losses or its accuracy on a development set. Adapted: it updates the policy
after an epoch on all its batches, here after each step; the text itself is not part of the state. `rule: average` takes
all teachers alike, `rule: best` the one with the lowest loss on the sequence.

Memory: the further teachers, and their hidden states [B, T, D]. Time: a pass of each, both heads for what the policy
sees, and with `reinforce` a pass of the student over `reward_sequences` held-out sequences in each step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import LimbeckError
from limbeck.core.objectives import Teachers
from limbeck.data.packing import IGNORE_INDEX, SequenceDataset
from limbeck.models import loading
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.fingerprint import fingerprint_tokenizer
from limbeck.ops.matrix_rows import make_generators
from limbeck.training.chunked_losses import TeacherLogits, TeacherLogitsFromHidden, logit_losses
from limbeck.training.objectives.base import Models, Objective, Surroundings, TextPass

FEATURES = ("teacher_ce", "ce", "kl")  # of a teacher on a sequence, what the policy sees
BASELINE_DECAY = 0.9  # of the running mean of the reward


@dataclass(frozen=True)
class MixedTeachers:
    """The logarithm of a weighted mean of several teachers' probabilities.

    teachers: K teachers' logits. weights: [B, K], which sum to one. length: T.
    """

    teachers: list[TeacherLogits]
    weights: Tensor
    length: int

    def for_tokens(self, tokens: Tensor) -> Tensor:
        logits: list[Any] = [one.for_tokens(tokens) for one in self.teachers]
        width = min(one.shape[-1] for one in logits)
        weights = self.weights[tokens // self.length].to(logits[0].dtype).unbind(-1)
        mixed: Any = sum(w[:, None] * one[:, :width].softmax(-1) for w, one in zip(weights, logits))
        return mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()


class TeachersObjective(Objective):
    """Selects among several teachers for each sequence."""

    name = "teachers"
    settings: Teachers
    single_process = "the gain on held-out text is that of one student in one process"

    theta: nn.Parameter
    bias: nn.Parameter
    theta_score: Tensor
    bias_score: Tensor
    seen: Tensor
    held_out_loss: Tensor
    baseline: Tensor

    def __init__(self, settings: Teachers, models: Models, seed: int):
        super().__init__(settings, models, seed)
        device = models.teacher.device
        loaded = [loading.load_teacher(loading.resolve_teacher(name), device)[0] for name in settings.names]
        self.others = tuple(loaded)  # a tuple, so that their weights are not taken for this module's own
        count = 1 + len(settings.names)
        if settings.rule == "reinforce":
            self.theta = nn.Parameter(torch.zeros(len(FEATURES)))
            self.bias = nn.Parameter(torch.zeros(count))
            # sums of ∇ log π over the sequences of a step, whose reward is known when the next one begins
            self.register_buffer("theta_score", torch.zeros(len(FEATURES)))
            self.register_buffer("bias_score", torch.zeros(count))
            self.register_buffer("seen", torch.zeros(()))  # sequences in these sums
            self.register_buffer("held_out_loss", torch.tensor(float("nan")))
            self.register_buffer("baseline", torch.tensor(float("nan")))

    @classmethod
    def check(cls, settings: Teachers, around: Surroundings, key: str) -> None:
        if around.tokenizer is None:  # a plan, for which the teachers need not be there
            return
        expected = fingerprint_tokenizer(around.tokenizer)
        for name in settings.names:
            place = loading.resolve_teacher(name)
            if fingerprint_tokenizer(loading.load_tokenizer(place)) != expected:
                raise LimbeckError(
                    f"{key}: '{name}' has another tokenizer than the recipe's teacher",
                    expected="teachers with the same tokenizer, so that their probabilities are of the same tokens",
                )
            config = loading.load_config(place).get_text_config()
            longest = getattr(config, "max_position_embeddings", None)
            if longest is not None and around.length > longest:
                raise LimbeckError(
                    f"{key}: sequences of {around.length} tokens exceed the maximum of '{name}', {longest}",
                    expected="teachers that can read the sequences",
                )

    @torch.no_grad()
    def begin_step(self, held_out: SequenceDataset | None) -> None:
        """Reward what was selected in the step before."""
        if self.settings.rule != "reinforce":
            return
        if held_out is None:
            raise LimbeckError("objectives.teachers: no held-out text to measure the student's gain on")
        loss = self._measure_held_out(held_out)
        if self.seen > 0:
            reward = self.held_out_loss - loss
            baseline = torch.where(self.baseline.isnan(), reward, self.baseline)
            advantage = (reward - baseline) / self.seen
            self.theta.grad, self.bias.grad = -advantage * self.theta_score, -advantage * self.bias_score
            self.baseline.copy_(BASELINE_DECAY * baseline + (1 - BASELINE_DECAY) * reward)
        self.held_out_loss.copy_(loss)
        for score in (self.theta_score, self.bias_score, self.seen):
            score.zero_()

    @torch.no_grad()
    def change_logits(self, done: TextPass) -> TeacherLogits:
        assert done.logits is not None
        models = self.models
        with models.autocast():
            others = [TeacherLogitsFromHidden(LMHead(one), run_backbone(one, done.batch)) for one in self.others]
        teachers = [done.logits, *others]
        rows, length = done.batch.input_ids.shape
        if self.settings.rule == "average":
            weights = torch.full((rows, len(teachers)), 1 / len(teachers), device=done.student.device)
        else:
            seen = torch.stack([self._observe(done, one) for one in teachers], 1)  # [B, K, features]
            weights = self._select_best(seen) if self.settings.rule == "best" else self._draw(done, seen)
        return MixedTeachers(teachers, weights, length)

    def _observe(self, done: TextPass, teacher: TeacherLogits) -> Tensor:
        """Measure what the policy sees of a teacher on each sequence, in nats a token: [B, features]."""
        rows = []
        for row in range(len(done.batch.input_ids)):
            targets = torch.full_like(done.batch.targets, IGNORE_INDEX)
            targets[row] = done.batch.targets[row]
            chunk = self.models.chunk_size
            sums, _ = logit_losses(self.models.student_head, done.student, teacher, targets, chunk_size=chunk)
            # every sequence of stage 3 has a target
            rows.append(torch.stack([sums[name] for name in FEATURES]) / float(sums["count"]))
        return torch.stack(rows)

    def _select_best(self, seen: Tensor) -> Tensor:
        best = seen[..., FEATURES.index("teacher_ce")].argmin(1)
        return nn.functional.one_hot(best, seen.shape[1]).to(seen.dtype)

    def _draw(self, done: TextPass, seen: Tensor) -> Tensor:
        """Select teachers by the policy, add ∇ log π to the sums, and return their weights [B, K]."""
        seen = seen.to(self.theta.dtype)
        probability = (seen @ self.theta + self.bias).sigmoid()
        generators = make_generators(done.batch.cpu_input_ids, self.seed)
        draws = torch.stack([torch.rand(seen.shape[1], generator=one) for one in generators]).to(seen.device)
        selected = (draws < probability).to(seen.dtype)
        score = selected - probability  # of the logits: d log π(a) / d logit = a - π
        self.theta_score += (score[..., None] * seen).sum((0, 1))
        self.bias_score += score.sum(0)
        self.seen += len(seen)
        weights = torch.where(selected.any(1, keepdim=True), selected, torch.ones_like(selected))
        return weights / weights.sum(1, keepdim=True)

    def _measure_held_out(self, held_out: SequenceDataset) -> Tensor:
        models, total, count = self.models, 0.0, 0.0
        for at in range(min(self.settings.reward_sequences, held_out.n_sequences)):
            # from the end, because evaluations read from the beginning
            batch = held_out.batch(held_out.n_sequences - 1 - at, 1).to(models.student.device)
            with models.autocast():
                hidden = run_backbone(models.student, batch)
                sums, _ = logit_losses(models.student_head, hidden, None, batch.targets, chunk_size=models.chunk_size)
            total, count = total + float(sums.get("ce", 0.0)), count + float(sums["count"])
        return self.held_out_loss.new_tensor(total / max(count, 1.0))
