"""What the tests of exports share: bodies of three families, a byte-level tokenizer, students that fit."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import limbeck
from helpers.paths import ROOT
from limbeck.models.export import get_exporter
from limbeck.testing import make_tiny_model

VOCABULARY = 320  # more rows than the tokenizer has tokens
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
# name: family and settings of its config
BODIES = {
    "tied": ("llama", {}),
    "untied": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
    "mistral": ("mistral", {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def make_teacher(body: str, **settings):
    family, own = BODIES[body]
    return make_tiny_model(family, **{**SIZES, **own, **settings})


def make_student(body: str = "tied", target: str = "gguf", softmax_layers: str = "none", options=None, **settings):
    """A student that fits but for `options`, with the mixers' parameters away from their starts."""
    teacher = make_teacher(body, **settings)
    fit = get_exporter(target).fit(teacher.config, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # mixers start with random factors
        student = limbeck.convert(
            teacher, fit.mixer, options={**fit.options, **(options or {})}, softmax_layers=softmax_layers
        )
    return disturb(student)


def disturb(student):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in student.named_parameters():
            if ".mixer." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return student.eval()


def make_tokenizer(pre_tokenizer=None, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator((ROOT / "LICENSE").read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer
