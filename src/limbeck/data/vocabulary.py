"""A small byte-level BPE vocabulary, learnt from text.

    tokenizer = learn_vocabulary(texts, 4096, context=2048)        # a tokenizer of transformers

Digits stand alone, so a number of any length is written in ten tokens; every byte has a token, so nothing is unknown.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


def learn_vocabulary(texts: Iterable[str], size: int, *, context: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` tokens, the first of which ends a document (and begins one, and pads).

    Args:
        texts: what is counted.
        context: the longest sequence of the model that it is for.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=END, eos_token=END, pad_token=END, model_max_length=context
    )
