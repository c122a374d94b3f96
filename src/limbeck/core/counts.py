"""Counts as people write them.

parse_count("20M")      # 20_000_000; also "1e6", "0.5k", "1.5B", "2_000", 2000
"""

import re
from decimal import Decimal
from typing import Any

from limbeck.core.errors import LimbeckError

UNITS = {"": 0, "k": 3, "m": 6, "b": 9, "t": 12}  # decimal exponents; of tokens, as papers count them
_COUNT = re.compile(r"([+-]?[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)\s?([kKmMbBtT]?)")


def parse_count(value: Any) -> Any:
    """Parse a count; what is no text is returned as it is.

    Raises:
        LimbeckError: another text, or a fraction.
    """
    if not isinstance(value, str):
        return value
    match = _COUNT.fullmatch(value.strip())
    number = Decimal(match[1].replace("_", "")).scaleb(UNITS[match[2].lower()]) if match else None
    if number is None or number != number.to_integral_value():
        raise LimbeckError(f"'{value}' is not a count", expected="a whole number: 20000, 20_000, 2e4, 20k, 20M or 1.5B")
    return int(number)
