"""Figures as SVG inside a page: they follow its light and dark colors, and the page can filter their series.

    svg = render_svg(figure)                                       # the text of the file
    html = embed_svg(svg, "f3", "Training loss over tokens")       # the <svg> element

Colors of `limbeck.report.figures.style` become variables of the page, black the color of its text, white nothing. Ids
get a prefix, so that several figures can live on one page; an id that is JSON (`limbeck.report.figures.panels`) becomes
the attribute `data-at`, by which the page filters.
"""

import io
import re
from html import escape
from typing import Any

from limbeck.report.figures.style import COLORS, RC_PARAMS

_BLACK = "#000000"
_GRID = "#" + f"{round(float(str(RC_PARAMS['grid.color'])) * 255):02x}" * 3
_NOISE = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)
_ID = re.compile(r""" id=(?P<quote>["'])(?P<text>.+?)(?P=quote)""")
_LINK = re.compile(r'(url\(|href=")#')
_FONT = re.compile(r"font-family: [^;\"]+")


def render_svg(figure: Any) -> str:
    """A figure as the text of an SVG file, the same for the same figure."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def embed_svg(svg: str, name: str, caption: str) -> str:
    """An <svg> element from the text of a file.

    Args:
        name: the prefix of its ids.
        caption: what is seen, for those who do not see it.
    """
    svg = _NOISE.sub("", svg[svg.index("<svg") :])
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])  # type: ignore[index]
    head = f'<svg role="img" aria-label="{escape(caption)}" style="--width: {width:.0f}" '
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]+")[^>]*>', lambda match: f"{head}{match[1]}>", svg)
    linked = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = _ID.sub(lambda match: _identity(match["text"], name, linked), svg)
    svg = _LINK.sub(lambda match: f"{match[1]}#{name}-", svg).replace("xlink:href", "href")
    svg = _FONT.sub("font-family: var(--sans)", svg)
    for index, colour in enumerate(COLORS):
        if colour != _BLACK:
            svg = re.sub(colour, f"var(--c{index})", svg, flags=re.IGNORECASE)
    svg = svg.replace("fill: #ffffff", "fill: none").replace(_BLACK, "currentColor").replace(_GRID, "var(--grid)")
    return re.sub(r">\s+<", "><", svg).replace("\n", " ")


def _identity(text: str, name: str, linked: set[str]) -> str:
    """What an element is filtered by; its id in this figure alone, where something links to it; else nothing."""
    if text.startswith("{"):
        return f" data-at='{text}'"
    return f' id="{name}-{text}"' if text in linked else ""
