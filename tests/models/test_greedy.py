"""Greedy is argmax and sampling is from the model's own probabilities, whatever its generation config says."""

import pytest
import torch
from transformers import GenerationConfig

import limbeck
from limbeck.models.generation import _generate, stream_text
from limbeck.testing import make_tiny_model

PROMPT = "the work and the work"
SETTINGS = [
    {"do_sample": True, "repetition_penalty": 1.3, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"no_repeat_ngram_size": 2},
    {"num_beams": 4},
    {"num_beams": 2, "early_stopping": True, "length_penalty": 2.0},
    {"return_dict_in_generate": True, "output_scores": True},
    {"forced_bos_token_id": 5},
    {"forced_eos_token_id": 5},
    {"min_length": 200},
    {"max_length": 3},
    {"max_time": 1e-6},
    {"prompt_lookup_num_tokens": 3},
    {"use_cache": False},
    {"exponential_decay_length_penalty": [1, 2.0]},
    {"num_return_sequences": 3, "do_sample": True},
    {"penalty_alpha": 0.6, "top_k": 4},
]


def argmax(model, ids: torch.Tensor, new: int) -> list[int]:
    """By hand."""
    made: list[int] = []
    with torch.no_grad():
        while len(made) < new and (not made or made[-1] != 2):
            made.append(int(model(torch.cat([ids, torch.tensor([made], dtype=torch.long)], 1)).logits[0, -1].argmax()))
    return made


def models():
    """A teacher that repeats itself (its head prefers one token), and a student of it."""
    teacher = make_tiny_model("llama", vocab_size=97).eval()
    return {"teacher": teacher, "student": limbeck.convert(teacher, "gated_deltanet").eval()}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: next(iter(one)))
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_greedy_is_argmax(settings, which, tokenizer):
    model = models()[which]
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    expected = argmax(model, ids, 12)
    assert len(set(expected)) < len(expected) or "repetition" not in next(iter(settings)), "nothing repeats: no test"
    usual = argmax(model, ids, 1)[0]
    for name in (None, "suppress_tokens", "bad_words_ids", "begin_suppress_tokens"):
        extra = {name: [[usual]] if name == "bad_words_ids" else [usual]} if name else {}
        if name == "suppress_tokens" and "forced" in next(iter(settings)):
            continue  # transformers refuses such a config
        config = GenerationConfig(eos_token_id=2, pad_token_id=0, **{**settings, **extra})
        model.generation_config = config
        before = config.to_dict()
        assert _generate(model, tokenizer, PROMPT, 12, 0.0, 1.0, 0).tolist() == expected
        assert model.generation_config is config
        assert config.to_dict() == before


def test_top_p_1_leaves_out_no_token(tokenizer):
    """Of 97 tokens nearly alike all come, although the config says top_k 1; a small top_p takes the likeliest."""
    model = models()["teacher"]
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, top_p=0.1, min_p=0.9, eos_token_id=None)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    came = {i for seed in range(6) for i in _generate(model, tokenizer, PROMPT, 60, 1.0, 1.0, seed).tolist()}
    assert len(came) > 80
    fresh = models()["teacher"]
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    assert _generate(fresh, tokenizer, PROMPT, 8, 1.0, 1e-6, 3).tolist() == argmax(fresh, ids, 8)
    assert _generate(fresh, tokenizer, PROMPT, 8, 1e-6, 1.0, 3).tolist() == argmax(fresh, ids, 8)


def test_the_tokens_that_end_a_text_are_kept(tokenizer):
    model = models()["teacher"]
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    third = argmax(model, ids, 3)[-1]
    for eos in (third, [96, third]):
        model.generation_config = GenerationConfig(eos_token_id=eos)
        made = _generate(model, tokenizer, PROMPT, 12, 0.0, 1.0, 0).tolist()
        assert made[-1] == third
        assert len(made) <= 3
    model.generation_config = GenerationConfig()
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.zero_()
    # the tokenizer's EOS where the config knows none: a constant model would go on for ever otherwise
    assert len(_generate(model, tokenizer, PROMPT, 5, 0.0, 1.0, 0)) == 5


def test_a_stream_counts_tokens_and_not_its_text_tokenised_again(tokenizer):
    model = models()["teacher"]
    model.generation_config = GenerationConfig(eos_token_id=None, num_beams=4)
    for new in (1, 7):
        pieces = stream_text(model, tokenizer, PROMPT, new)
        count, text = None, ""
        while count is None:
            try:
                text += next(pieces)
            except StopIteration as end:
                count = end.value
        assert count == new
        assert text == tokenizer.decode(_generate(model, tokenizer, PROMPT, new, 0.0, 1.0, 0), skip_special_tokens=True)
