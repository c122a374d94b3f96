"""What a race found of one model: points, one a length and batch size; the numbers of the table; break-even lengths.

A name says what, in which unit, and behind the @ at which length and batch size: `token_milliseconds@4096x1`. Where a
model can decode with a growing and a static cache, the faster of both is its `token_milliseconds`.
"""

from typing import Any

from limbeck.evaluate.decoding import Point, break_even
from limbeck.evaluate.prefill import Prefill

KINDS = ("growing", "static")


def point_of(
    name: str, length: int, batch: int, prefills: dict[str, Prefill], tokens: dict[str, Point]
) -> dict[str, Any]:
    """All that was measured of one model at one length and batch size, ready for JSON.

    Args:
        prefills, tokens: by contestant: the model's name, " / " and the kind of its cache.
    """
    point: dict[str, Any] = {"length": length, "batch": batch, "token": {}}
    prefill = prefills.get(f"{name} / growing")
    if prefill is not None:
        point["prefill"] = {
            "milliseconds": prefill.milliseconds,
            "least": prefill.least,
            "most": prefill.most,
            "extra_bytes": prefill.extra_bytes,
        }
    for kind in KINDS:
        token = tokens.get(f"{name} / {kind}")
        if token is not None:
            point["token"][kind] = {
                "milliseconds": token.milliseconds,
                "least": token.least,
                "most": token.most,
                "cache_bytes": token.bytes,
            }
    return point


def token_milliseconds(point: dict[str, Any]) -> float:
    """With the faster kind of cache."""
    return min(kind["milliseconds"] for kind in point["token"].values())


def fastest(point: dict[str, Any]) -> dict[str, Any]:
    """The faster kind of cache: milliseconds, least, most, cache_bytes."""
    return min(point["token"].values(), key=lambda kind: kind["milliseconds"])


def values_of(points: list[dict[str, Any]], weights: int, parity: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The numbers of the table.

    Args:
        weights: bytes of the model's weights.
        parity: what `break_evens` gave; the first rival's lengths are shown.
    """
    values: dict[str, float] = {"weights_bytes": weights}
    for point in points:
        at = f"@{point['length']}x{point['batch']}"
        prefill = point.get("prefill")
        if prefill is not None:
            values[f"first_token_milliseconds{at}"] = prefill["milliseconds"]
            values[f"prefill_tokens_per_second{at}"] = 1000 * point["batch"] * point["length"] / prefill["milliseconds"]
            if prefill["extra_bytes"] is not None:
                values[f"peak_bytes{at}"] = weights + prefill["extra_bytes"]
        values[f"token_milliseconds{at}"] = token_milliseconds(point)
        if len(point["token"]) > 1:
            for kind, token in point["token"].items():
                values[f"token_milliseconds_{kind}_cache{at}"] = token["milliseconds"]
        values[f"cache_bytes{at}"] = point["token"]["growing"]["cache_bytes"]
    for batch, lengths in next(iter(parity.values()), {}).items():
        for what, length in lengths.items():
            if length is not None:
                values[f"break_even_{what}_tokens@batch{batch}"] = length
    return values


def break_evens(points: list[dict[str, Any]], rivals: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """From which length on a model is faster and smaller than each rival, by batch size; None for never.

    Needs two lengths at least; {} for a batch size with fewer.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, theirs in rivals.items():
        found[name] = {}
        for batch in sorted({point["batch"] for point in points}):
            mine = sorted((p for p in points if p["batch"] == batch), key=lambda p: p["length"])
            other = sorted((p for p in theirs if p["batch"] == batch), key=lambda p: p["length"])
            if len(mine) < 2:
                continue
            lengths = [p["length"] for p in mine]
            sizes = [[p["token"]["growing"]["cache_bytes"] for p in of] for of in (other, mine)]
            times = [[token_milliseconds(p) for p in of] for of in (other, mine)]
            found[name][str(batch)] = {
                "time": break_even(lengths, *times),
                "memory": break_even(lengths, *sizes),
            }
    return found
