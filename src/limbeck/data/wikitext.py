"""Plain text of Wikipedia articles in a MediaWiki export: prose and headings, without what is no prose.

    for title, text in articles(bz2.open("enwiki-pages-articles.xml.bz2")):
        ...

What goes: redirects and pages that are no articles, comments, references, tables, templates, files, lists, formulas,
and everything from "See also" or "References" on. Also the introduction, all before the first heading: collections of
Wikipedia's summaries hold it word for word, and they are training text (`limbeck.data.corpus`).
"""

import html
import re
from collections.abc import Iterator
from typing import IO
from xml.etree import ElementTree

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


def articles(file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """(title, text) of each article of an export, in stored order; those without prose are left out."""
    for _, element in ElementTree.iterparse(file):
        if not element.tag.endswith("}page"):
            continue
        space = {"w": element.tag[1 : element.tag.index("}")]}
        title = element.findtext("w:title", "", space)
        markup = element.findtext("w:revision/w:text", "", space)
        is_article = element.findtext("w:ns", "", space) == "0" and element.find("w:redirect", space) is None
        element.clear()
        if is_article and (text := plain_text(markup)):
            yield title, text


def plain_text(markup: str) -> str:
    """Prose and headings of one article's markup, paragraphs parted by blank lines; "" where there is none."""
    text = GONE.sub("", markup)
    while text != (inner := INNERMOST.sub("", text)):  # templates and tables stand in each other
        text = inner
    text = MEDIA.sub("", text)
    text = WEB_LINK.sub(r"\1", LINK.sub(r"\1", text))
    text = html.unescape(re.sub(r"<[^<>]*>", "", text)).replace("\xa0", " ")
    text = re.sub(r"'{2,}|__[A-Z]+__", "", text)
    text = re.sub(r"[ \t]+(?=[,;.)])", "", re.sub(r"[ \t]*\([ \t,;]*\)", "", text))  # where a template stood
    kept: list[str] = []
    heading, begun = "", False
    for line in text.splitlines():
        if found := HEADING.match(line):
            if ENDINGS.fullmatch(found[2]):
                break
            heading, begun = found[2], True
        elif begun and (prose := re.sub(r"\s+", " ", line).strip()) and prose[0] not in "*#:;|!{}=<[":
            if heading:
                kept.append(heading)
            heading = ""
            kept.append(prose)
    return "\n\n".join(kept)
