"""The common look of all figures, an empty figure and its file.

    with use_style(["teacher", "runs/gla"]):             # fonts, grid, colours; a model keeps its colour in all figures
        figure = create_figure(6, 4)
        axes = figure.subplots()
        axes.plot(x, y, label="teacher", **get_marker_style("teacher"))
        save_figure(figure, Path("picture.svg"))

Colours are Okabe and Ito's and two more, which stay apart for colour-blind readers; markers tell models apart without
colour. Where `get_marker_style` is not asked, lines take the same colours in the order in which they are drawn. matplotlib is drawn
without a screen and imported late: it belongs to the extra `report`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6914", "#882255")
COLOR_NAMES = ("blue", "vermilion", "green", "pink", "orange", "sky blue", "black", "brown", "purple")
MARKERS = "osD^vPX*"
RC_PARAMS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "image.cmap": "cividis",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "limbeck",  # the same figure is the same file
    "pdf.fonttype": 42,
}

_known: dict[str, int] = {}  # models in the order in which they were first seen


@contextmanager
def use_style(models: Iterable[str] = ()) -> Iterator[None]:
    """Draw and save inside: what is outside keeps its own matplotlib settings.

    Args:
        models: they get their colours in this order; without them, in the order in which they are drawn.
    """
    matplotlib = _matplotlib()
    before = dict(_known)
    _known.clear()
    for model in models:
        _known.setdefault(model, len(_known))
    cycle = matplotlib.cycler(color=list(COLORS))
    try:
        with matplotlib.rc_context({**RC_PARAMS, "axes.prop_cycle": cycle}):
            yield
    finally:
        _known.clear()
        _known.update(before)


@contextmanager
def use_colors(colors: list[str]) -> Iterator[None]:
    """Inside a `use_style`: lines that are drawn without a colour take these, in this order."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context({"axes.prop_cycle": matplotlib.cycler(color=colors)}):
        yield


def get_color(model: str) -> str:
    """A model's colour: the same in all figures that are drawn inside one `use_style`."""
    return COLORS[_known.setdefault(model, len(_known)) % len(COLORS)]


def get_marker(model: str) -> str:
    """A model's marker; from the tenth model on colours begin again, markers are shifted by one."""
    index = _known.setdefault(model, len(_known))
    return MARKERS[(index + index // len(COLORS)) % len(MARKERS)]


def get_marker_style(model: str) -> dict[str, str]:
    """Colour and marker of a model's line, as keyword arguments of `plot`."""
    return {"color": get_color(model), "marker": get_marker(model)}


def get_linestyle(model: str) -> str:
    """How a model's line is drawn where it has no markers: dashed once its colour is not its own."""
    return "-" if _known.setdefault(model, len(_known)) < len(COLORS) else "--"


def use_log_scale(axis: Any) -> None:
    """A y axis in logarithms with plain numbers: 0.4, 0.6, 1."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Labels what LogFormatter labels."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:,g}" if super().__call__(x, pos) else ""

    axis.axes.set_yscale("log")
    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))


def create_figure(width: float, height: float) -> Any:
    """A figure of so many inches; LimbeckError where matplotlib is not installed."""
    _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_figure_format(path: Path) -> None:
    """Raises LimbeckError where no picture can be written to a file of that name."""
    known = create_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise LimbeckError(f"cannot write a picture to {path}", expected="a name that ends in .png, .svg or .pdf")


def save_figure(figure: Any, path: Path) -> None:
    """Write the picture; its format is that of the file's ending (png, svg, pdf)."""
    check_figure_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=160, **undated)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise LimbeckError("pictures need matplotlib", hint="pip install 'limbeck[report]'") from error
    return matplotlib
