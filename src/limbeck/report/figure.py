"""An empty figure and its file, for every picture of the project.

    figure = new_figure(6, 4)
    save(figure, Path("picture.svg"))

matplotlib is drawn without a screen and imported late: it belongs to the extra `report`.
"""

from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches; LimbeckError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LimbeckError("pictures need matplotlib", hint="pip install 'limbeck[report]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_format(path: Path) -> None:
    """Raises LimbeckError where no picture can be written to a file of that name."""
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise LimbeckError(f"cannot write a picture to {path}", expected="a name that ends in .png, .svg or .pdf")


def save(figure: Any, path: Path) -> None:
    """Write the picture; its format is that of the file's ending (png, svg, pdf)."""
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
