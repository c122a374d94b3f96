"""Names and numbers of measurements as people read them: units from the names, bytes as MB, shares as percent.

    label("token_milliseconds@4096x1")                  # "token at 4,096 tokens, ms"
    shown("cache_bytes@4096x1", 188743680.0)            # "189 MB"
    shown("top1_agreement", 0.528, 0.004)               # "52.8 ± 0.4 %"

What a name ends with says its unit (docs/measurements.md); files and CSV keep the plain numbers.
"""

import math
import re
from typing import Any

WORDS = {"kl": "KL", "js": "JS", "ce": "CE", "cka": "CKA", "top1": "top-1", "top5": "top-5", "acc": "accuracy"}
UNITS = {"milliseconds": "ms", "seconds": "s", "per_second": "a second"}
SHARES = ("agreement", "share", "accuracy", "acc", "acc_norm", "overlap", "mass")
_AT = re.compile(r"(?P<name>[^@]+)@((?P<length>\d+)x(?P<batch>\d+)|batch(?P<alone>\d+)|(?P<tokens>\d+))")


def label(name: str) -> str:
    """A row's name: words, at which length and batch size, the unit where the cells do not say it."""
    match = _AT.fullmatch(name)
    place = ""
    if match:
        name, length = match["name"], match["length"] or match["tokens"]
        batch = match["batch"] or match["alone"]
        place = f" at {int(length):,} tokens" if length else ""
        place += f", batch {batch}" if batch and batch != "1" else ""
    unit = ""
    for ending, short in UNITS.items():
        if re.search(rf"(^|_){ending}(_|$)", name):
            if ending != "per_second":
                name = re.sub(rf"_?{ending}", "", name, count=1)
                unit = f", {short}"
            break
    words = [WORDS.get(word, word) for word in name.removesuffix("_bytes").strip("_").split("_")]
    return " ".join(words).replace("per second", "a second") + place + unit


def shown(name: str, value: float, error: float | None = None) -> str:
    """A number with its standard error, in the unit that its name says."""
    name = name.split("@")[0]
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e9 and not name.endswith(("bytes", "tokens")):  # a student that diverged
        return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.2g}"
    if name.endswith("bytes"):
        return size(value)
    if is_share(name) and abs(value) <= 1:
        return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"
    if name.endswith("tokens") or abs(value) >= 10000:
        return f"{value:,.0f}" if error is None else f"{value:,.0f} ± {error:,.0f}"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def literal(text: Any) -> str:
    """Text of somebody else's (names, prompts, samples) as Markdown that shows it as it is, on one line.

    It becomes neither HTML nor an image, a link, a list, code or the end of a table's cell.
    """
    plain = " ".join(str(text).split())
    plain = re.sub(r"&(?=#?\w+;)", "&amp;", plain).replace("<", "&lt;")
    plain = re.sub(r"([\\`*\[\]|])", r"\\\1", plain)
    return re.sub(r"^(\d*)([-+#>.)])(?= |$)", r"\1\\\2", plain)


def code(text: Any) -> str:
    """The same as code: nothing in it ends the span."""
    return f"`{' '.join(str(text).replace('`', chr(39)).split())}`"


def is_share(name: str) -> bool:
    """Whether a name stands for a part of a whole."""
    return any(name == share or name.endswith(f"_{share}") or f"_{share}_" in f"_{name}_" for share in SHARES)


def size(count: float) -> str:
    """Bytes with three digits."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 1000 else f"{count:,.0f} GB"
