"""Named sets of mixers, for studies.

    mixers.selection("paper-v3")         # ["linear_attention", "retnet", "gla", ...]
    mixers.selection("gla,kda")          # ["gla", "kda"]

The paper's second version names only xLSTM, GLA, MetaLA and linear attention; the other four of its eight are a
reconstruction. Its third version names all seven.
"""

from limbeck.errors import LimbeckError
from limbeck.mixers.registry import get, names

PAPER_V2 = ("linear_attention", "rebased", "hedgehog", "retnet", "gla", "metala", "deltanet", "mlstm")
PAPER_V3 = ("linear_attention", "retnet", "gla", "mlstm", "deltanet", "gated_deltanet", "kda")


def sets() -> dict[str, list[str]]:
    """The named sets: paper-v2 and paper-v3 (arXiv 2504.14366), and all that are registered."""
    return {"paper-v2": list(PAPER_V2), "paper-v3": list(PAPER_V3), "all": names()}


def selection(text: str) -> list[str]:
    """Mixers named one by one ("gla,kda") or by a set; LimbeckError where there is no such set or mixer."""
    known = sets()
    if text in known:
        return known[text]
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    if not chosen:
        raise LimbeckError("no students named", expected=f"names as a,b,c, or a set: {', '.join(known)}")
    for name in chosen:
        get(name)
    return list(dict.fromkeys(chosen))
