"""The common style of all figures; how to create and save one.

    with use_style(["teacher", "runs/gla"]):             # fonts, grid, colors; a model keeps its color in all figures
        figure = create_figure(6, 4)
        axes = figure.subplots()
        axes.plot(x, y, label="teacher", **get_marker_style("teacher"))
        save_figure(figure, Path("figure.svg"))

Colors are those of Okabe and Ito and a few more, which color-blind readers can distinguish; markers distinguish models
without color. Lines without `get_marker_style` take the same colors in the order in which they are drawn. matplotlib
belongs to the extra `report`, so it is imported late; it draws without a screen.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError
from limbeck.core.extras import require

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

_model_index: dict[str, int] = {}  # models in the order of their first use; valid inside `use_style`


@contextmanager
def use_style(models: Iterable[str] = ()) -> Iterator[None]:
    """Apply the style to figures that are drawn and saved inside; restores matplotlib's settings.

    Args:
        models: get their colors in this order; other models in the order in which they are drawn.
    """
    matplotlib = _import_matplotlib()
    before = dict(_model_index)
    _model_index.clear()
    for model in models:
        _model_index.setdefault(model, len(_model_index))
    cycle = matplotlib.cycler(color=list(COLORS))
    try:
        with matplotlib.rc_context({**RC_PARAMS, "axes.prop_cycle": cycle}):
            yield
    finally:
        _model_index.clear()
        _model_index.update(before)


@contextmanager
def use_colors(colors: list[str]) -> Iterator[None]:
    """Set the colors of lines that are drawn without one, in this order; use it inside `use_style`."""
    matplotlib = _import_matplotlib()
    with matplotlib.rc_context({"axes.prop_cycle": matplotlib.cycler(color=colors)}):
        yield


def get_color(model: str) -> str:
    """Get a model's color, the same in all figures inside one `use_style`."""
    return COLORS[_model_index.setdefault(model, len(_model_index)) % len(COLORS)]


def get_marker(model: str) -> str:
    """Get a model's marker; from the tenth model on colors repeat, so markers are shifted by one."""
    index = _model_index.setdefault(model, len(_model_index))
    return MARKERS[(index + index // len(COLORS)) % len(MARKERS)]


def get_marker_style(model: str) -> dict[str, str]:
    """Get color and marker of a model's line as keyword arguments of `plot`."""
    return {"color": get_color(model), "marker": get_marker(model)}


def get_linestyle(model: str) -> str:
    """Get the style of a model's line without markers: dashed once its color is used a second time."""
    return "-" if _model_index.setdefault(model, len(_model_index)) < len(COLORS) else "--"


def use_log_scale(axis: Any) -> None:
    """Make a y axis logarithmic, with plain numbers: 0.4, 0.6, 1."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Labels the same ticks as LogFormatter."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:,g}" if super().__call__(x, pos) else ""

    axis.axes.set_yscale("log")
    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))


def create_figure(width: float, height: float) -> Any:
    """Create a figure, sizes in inches; raises LimbeckError if matplotlib is not installed."""
    _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_figure_format(path: Path) -> None:
    """Raises LimbeckError if matplotlib does not support the format of the file's suffix."""
    formats = create_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise LimbeckError(f"unsupported figure format: {path}", expected="a file name ending in .png, .svg or .pdf")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format of the file's suffix (png, svg, pdf)."""
    check_figure_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date the same figure is the same file.
    options = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=160, **options)


def _import_matplotlib() -> Any:
    require("matplotlib", "figures")
    # late: an optional dependency
    import matplotlib

    return matplotlib
