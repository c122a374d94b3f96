"""Conversations: the state goes on from turn to turn, and what is read is the conversation's text, once."""

import pytest
import torch

from helpers.exported import VOCABULARY, make_student, make_tokenizer
from limbeck import LimbeckError
from limbeck.evaluation.sampled_text import sampler
from limbeck.models import export as exports
from limbeck.models.conversation import Conversation, LlamaCppEngine, Sampling, StudentEngine, list_end_tokens
from limbeck.models.export.record import write_export
from limbeck.models.generation import stream_text

FORGETFUL = (  # shows of earlier answers nothing
    "{% for m in messages %}<s>{{ m['role'] }}\n"
    "{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def words():
    return make_tokenizer()


class Recorder:
    """An engine that notes what it reads and each time it forgets."""

    def __init__(self, engine, without_special: bool = False):
        self.engine, self.calls, self.resets = engine, [], 0
        self.bias = torch.zeros(VOCABULARY)
        if without_special:
            self.bias[:3] = -torch.inf

    def read(self, ids):
        self.calls.append(list(ids))
        return self.engine.read(ids) + self.bias

    def reset(self):
        self.resets += 1
        self.calls.clear()
        self.engine.reset()

    @property
    def ids(self):
        return [token for call in self.calls for token in call]


class Script:
    """An engine that wants given tokens, one after each call."""

    def __init__(self, tokens):
        self.tokens = list(tokens)

    def read(self, ids):
        return torch.nn.functional.one_hot(torch.tensor(self.tokens.pop(0)), VOCABULARY).float()

    def reset(self):
        pass


@pytest.mark.parametrize("target", ["gguf", "qwen3_5"])
def test_the_state_after_turns_is_that_of_the_whole_text(target, words):
    student = make_student("tied", target)
    engine = Recorder(StudentEngine(student), without_special=True)
    talk = Conversation(engine, words, Sampling(max_new_tokens=5))
    for message in ("The work", "and the license", "of it"):
        before = len(engine.ids)
        assert "".join(talk.reply(message))
        assert len(engine.ids) - before < 60
    assert engine.resets == talk.rereadings == 0
    assert len(engine.ids) == talk.num_tokens
    assert words.decode(engine.ids) == talk.text
    with torch.no_grad():
        whole = student(torch.tensor([[*engine.ids, 7]])).logits[0, -1]
    assert torch.allclose(engine.engine.read([7]), whole, rtol=0, atol=1e-3)


def test_an_answer_ends_at_its_end_token_which_is_read(words):
    answer = words("naïve", add_special_tokens=False).input_ids
    engine = Recorder(Script([*answer, 2, 0]))
    talk = Conversation(engine, words, Sampling())
    pieces = list(talk.reply("Hi"))
    assert "".join(pieces) == "naïve"
    assert not any("\ufffd" in piece for piece in pieces)
    assert engine.ids[-1] == 2
    assert talk.text == "<s>user\nHi</s>\n<s>assistant\nnaïve</s>"
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_a_control_token_inside_an_answer_cannot_be_continued_by_the_template(words):
    inside, end = 1, 2
    engine = Recorder(Script([50, inside, 51, end, 0, 50, end, 0]))
    talk = Conversation(engine, words, Sampling())
    list(talk.reply("One"))
    assert "<s>" in talk.text.rpartition("assistant\n")[2]
    assert "<s>" not in talk.messages[-1]["content"]
    list(talk.reply("Two"))
    assert engine.resets == talk.rereadings == 1


def test_a_template_that_rewrites_earlier_turns_has_them_read_again():
    words = make_tokenizer(template=FORGETFUL)
    engine = Recorder(StudentEngine(make_student("tied")))
    talk = Conversation(engine, words, Sampling(max_new_tokens=3), system="Be brief")
    list(talk.reply("One"))
    list(talk.reply("Two"))
    assert engine.resets == talk.rereadings == 1
    assert words.decode(engine.ids).startswith(
        "<s>system\n</s>\n<s>user\nOne</s>\n<s>assistant\n</s>\n<s>user\nTwo</s>"
    )
    assert len(engine.ids) == talk.num_tokens


def test_sampling():
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    drawn = {}
    for top_p in (0.5, 0.7, 1.0):
        generator = torch.Generator().manual_seed(0)
        draws = [Sampling(1.0, top_p).choose(logits, generator) for _ in range(2000)]
        drawn[top_p] = [draws.count(token) / 2000 for token in range(3)]
    assert drawn[0.5] == [0, 1, 0]
    assert drawn[0.7] == pytest.approx([0, 2 / 3, 1 / 3], abs=0.04)
    assert drawn[1.0] == pytest.approx([0.1, 0.6, 0.3], abs=0.04)
    assert Sampling().choose(logits, torch.Generator()) == 1


def test_a_model_that_diverged_draws_nothing(words):
    student = make_student("tied")
    with torch.no_grad():
        student.base_model.norm.weight.fill_(torch.nan)
    for draw in (
        lambda: Sampling(0.7).choose(torch.full([4], torch.nan), torch.Generator()),
        lambda: "".join(stream_text(student, words, "hi", 3, 0.7, 1.0, 0)),
        lambda: sampler(0, torch.device("cpu"))(torch.full([2, 4], torch.nan)),
    ):
        with pytest.raises(LimbeckError, match="not finite"):
            draw()


def test_end_tokens():
    student = make_student("tied")
    student.generation_config.eos_token_id = [2, 5]
    assert list_end_tokens(student) == [2, 5]
    student.generation_config.eos_token_id = 2
    assert list_end_tokens(student) == [2]


def test_without_a_chat_template():
    with pytest.raises(LimbeckError, match="limbeck generate"):
        Conversation(Script([]), make_tokenizer(template=None), Sampling())


def test_a_template_without_a_system_message_says_so():
    """As Gemma's, which raises an error."""
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    talk = Conversation(Script([]), make_tokenizer(template=template), Sampling(), system="Be kind.")
    with pytest.raises(LimbeckError, match=r"no system role(.|\n)*leave out --system"):
        next(talk.reply("hi"))


def test_llama_cpp_says_the_same(words, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    from limbeck.models.export.llama_cpp import LlamaCpp

    student = make_student("tied")
    write_export(exports.get_exporter("gguf"), student, words, tmp_path / "out", "f32")
    with LlamaCpp(tmp_path / "out" / "student-f32.gguf") as opened:
        talks = [
            Conversation(engine, words, Sampling(max_new_tokens=8))
            for engine in (StudentEngine(student), LlamaCppEngine(opened))
        ]
        for message in ("The work", "and the license"):
            one, other = ("".join(talk.reply(message)) for talk in talks)
            assert one == other
