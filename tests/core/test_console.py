"""Results on screens and in pipes: nothing is cut, and somebody else's text is shown as it is."""

import io

import pytest
from markdown_it import MarkdownIt
from rich.markdown import Markdown
from rich.table import Table

from limbeck.core.console import UncroppedConsole
from limbeck.report.text_tables import escape_markdown, format_code_span

NUMBERS = ["214.6 ± 0.18", "0.8012 ± 0.001", "123,456,789 bytes", "1.43e-05"]


def shown(what, width=None) -> str:
    file = io.StringIO()
    console = UncroppedConsole(file=file, highlight=False, no_color=True, width=width, force_terminal=width is not None)
    console.print(what)
    return file.getvalue()


def table() -> Table:
    made = Table(box=None, pad_edge=False)
    for head in ("model", "perplexity", "KL, nats", "cache", "learning rate"):
        made.add_column(head, overflow="fold")
    made.add_row("runs/quickstart-gated_deltanet-seed0", *NUMBERS)
    made.add_row("runs/[red]x", *NUMBERS)
    return made


def document() -> Markdown:
    return Markdown(
        "# study\n\n| student | perplexity | kl | bytes | rate |\n|---|---:|---:|---:|---:|\n"
        + f"| gated_deltanet | {' | '.join(NUMBERS)} |\n\n**holds**: a claim\n"
    )


@pytest.mark.parametrize("make", [table, document])
@pytest.mark.parametrize("width", [None, 30, 50, 80, 200])
def test_no_number_is_cut_or_folded_at_any_width(make, width):
    text = shown(make(), width)
    assert "…" not in text
    for number in NUMBERS:
        assert number in text


def test_a_pipe_gets_a_line_for_each_row_and_markdown_as_it_is():
    assert len(shown(table()).splitlines()) == 3
    assert f"| gated_deltanet | {' | '.join(NUMBERS)} |" in shown(document())


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)>",
        "![x](https://tracker.example/pixel.png)",
        "[click](javascript:alert(1))",
        "`code` and **bold** | a cell",
        "- a list",
        "1. a list",
        "# a title",
        "&lt;b&gt; & <b>",
        "back\\slash \\* and \\[",
        "two\n\nparagraphs <script>",
    ],
)
def test_somebody_elses_text_is_shown_as_it_is(text):
    """What a Markdown reader makes of it is the same text again, in one paragraph without a tag."""
    reader = MarkdownIt("commonmark", {"html": True})
    (_, inline, _) = reader.parse(escape_markdown(text))
    assert inline.type == "inline"
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children) == " ".join(text.split())
    assert "\n" not in escape_markdown(text)


def test_code_is_not_ended_from_inside():
    (_, inline, _) = MarkdownIt().parse(format_code_span("a`b<img>`"))
    assert [child.type for child in inline.children] == ["code_inline"]
