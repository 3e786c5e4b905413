"""Axes and numbers for people: round ticks, short numbers with units."""

import math

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MISSING = "\N{EN DASH}"
_NO_SPAN = 1e-300  # parts of less are no normal numbers, and some of them zero


def ticks(low: float, high: float, target: int = 5) -> list[float]:
    """About `target` round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    span = high - low
    if not (math.isfinite(span) and span > _NO_SPAN):
        return [low]
    raw = span / max(1, target - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.85), power * 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") + 0.0 for index in range(first, last + 1)]


def short(value: float | None, unit: str = "", digits: int = 3) -> str:
    """A number in at most `digits` digits and a prefix: 1234567 -> "1.23M"; missing or NaN is a dash."""
    if value is None or not math.isfinite(value):
        return MISSING
    for factor, prefix in _PREFIXES:
        # The comparison leaves room for rounding, so that 999,999 becomes 1M and not 1e+03k.
        if abs(value) >= factor * (1 - 0.5 * 10.0**-digits):
            return f"{_plain(value / factor, digits)}{' ' if unit else ''}{prefix}{unit}"
    return f"{_plain(value, digits)}{' ' + unit if unit else ''}"


def fixed(value: float | None, decimals: int = 3) -> str:
    """A number with fixed decimals; missing or NaN is a dash."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{decimals}f}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: "42 s", "3 min 05 s", "2 h 07 min"."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _plain(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)) + 1e-12))
    text = f"{value:.{min(decimals, 9)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
