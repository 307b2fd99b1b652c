"""Numbers as a person reads them: shares, changes, quantities with a unit, durations."""

from __future__ import annotations


def share_text(share: float) -> str:
    """Return a share as text: 0.4 is "40 %"."""
    return f"{share * 100:.0f} %"


def percent(share: float) -> str:
    """Return a relative change as text, with its sign: −0.025 is "−2.5 %"."""
    return f"{signed(share * 100, 1)} %"


def signed(value: float, digits: int) -> str:
    """Return a number with its sign. What rounds to zero has none.

    The minus is a true one and not a hyphen.

    Args:
        value: the number.
        digits: digits after the point.
    """
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text[1:] if float(text[1:]) == 0 else text


def quantity(value: float, unit: str) -> str:
    """Return a quantity with one to three digits before the point: "3.41 GB".

    Args:
        value: the quantity in the unit, 0 or more.
        unit: its sign, such as "B". With "" only the prefix is written: "92 M".
    """
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}".rstrip()


def duration(seconds: float) -> str:
    """Return a time as a person says it, in seconds, minutes or hours: "7.4 min"."""
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
