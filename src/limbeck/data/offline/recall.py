"""Recall tasks: documents whose end repeats what stood earlier, which attention can predict and a small state cannot.

    characters = write_recall_documents(Path("recall.jsonl"), texts, documents=12_000)

Each line is `{"source": "pairs", "text": ...}`. All words and passages are those of the given texts; which of them, in
which order and how far apart is drawn from the number of the document, so the same texts give the same file. A third
of the documents is of each kind:

| source | what | what has to be remembered |
| --- | --- | --- |
| pairs (MQAR, arXiv 2312.04927) | N lines ` key value`, then the same lines in another order | N associations |
| list | N words, text in between, then the N words again, up to three times | N words in order, over a distance |
| copy | a passage, text in between, then the passage again, up to three times | a passage in order, over a distance |

N and the distances are spread evenly over their logarithms: 4 to 96 pairs, 8 to 128 words, passages of 16 to 128 words,
up to 400 words in between. Words in pairs and lists are distinct within a document, so only recall predicts them.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from limbeck.core.errors import LimbeckError

WORDS = 1024  # different words in pairs and lists
REPEAT_MARKER = "\n\nAgain:\n\n"  # stands before what is repeated
TASK_KINDS = ("pairs", "list", "copy")


def write_recall_documents(out: Path, texts: Sequence[str], documents: int, seed: int = 0) -> dict[str, int]:
    """Write the documents as JSON lines, the kinds in turn.

    Args:
        out: the file to write.
        texts: what words and passages are taken from; held-out text among them would be trained on.
        documents: how many.

    Returns:
        The number of characters of each kind.

    Raises:
        LimbeckError: texts too short for passages, or with too few different words.
    """
    words, passages = find_common_words(texts), PassageSampler(texts)
    makers = {"pairs": make_pairs, "list": make_word_list, "copy": make_copied_passage}
    characters = dict.fromkeys(TASK_KINDS, 0)
    with open(out, "w", encoding="utf-8", newline="\n") as file:
        for number in range(documents):
            kind = TASK_KINDS[number % len(TASK_KINDS)]
            text = makers[kind](random.Random(f"{seed} {number}"), words, passages)
            file.write(json.dumps({"source": kind, "text": text}, ensure_ascii=False) + "\n")
            characters[kind] += len(text)
    return characters


def find_common_words(texts: Sequence[str], count: int = WORDS) -> list[str]:
    """Return the most frequent lower-case words of 4 to 9 letters, each a token or few in a small vocabulary."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"(?<= )[a-z]{4,9}(?=[ ,.;])", text))
    words = sorted(counts, key=lambda word: (-counts[word], word))[:count]
    if len(words) < count:
        raise LimbeckError(f"{len(words):,} different words in the text", expected=f"{count:,} for recall tasks")
    return words


class PassageSampler:
    """Draws passages of running text."""

    LONGEST = 400

    def __init__(self, texts: Sequence[str]):
        self.paragraphs = [
            paragraph for text in texts for paragraph in text.split("\n") if paragraph.count(" ") > self.LONGEST // 4
        ]
        if not self.paragraphs:
            raise LimbeckError("no paragraph of a hundred words in the text", expected="running text")

    def draw(self, rng: random.Random, count: int) -> str:
        """Draw `count` words of a random paragraph, from a random word on; fewer where it is shorter."""
        words = rng.choice(self.paragraphs).split(" ")
        begin = rng.randrange(max(1, len(words) - count))
        return " ".join(words[begin : begin + count]).strip()


def make_pairs(rng: random.Random, words: list[str], passages: PassageSampler) -> str:
    """Make N lines of key and value, then every line again, shuffled."""
    count = _draw_log_uniform(rng, 4, 96)
    drawn = rng.sample(words, 2 * count)
    lines = [f" {key} {value}\n" for key, value in zip(drawn[:count], drawn[count:])]
    return "".join(lines + rng.sample(lines, count))


def make_word_list(rng: random.Random, words: list[str], passages: PassageSampler) -> str:
    """Make a list of words, a passage, and the words again."""
    return _repeat(rng, " " + " ".join(rng.sample(words, _draw_log_uniform(rng, 8, 128))), passages)


def make_copied_passage(rng: random.Random, words: list[str], passages: PassageSampler) -> str:
    """Make a passage, another one, and the first again."""
    return _repeat(rng, passages.draw(rng, _draw_log_uniform(rng, 16, 128)), passages)


def _repeat(rng: random.Random, text: str, passages: PassageSampler) -> str:
    between = passages.draw(rng, _draw_log_uniform(rng, 1, PassageSampler.LONGEST))
    return f"{text}\n\n{between}" + f"{REPEAT_MARKER}{text}" * rng.randint(1, 3)


def _draw_log_uniform(rng: random.Random, low: int, high: int) -> int:
    """Draw an integer from `low` to `high`, its logarithm uniform."""
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))
