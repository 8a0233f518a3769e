"""Durations and sizes for a person."""

from typing import Final

_UNITS: Final = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def duration(seconds: float) -> str:
    """`2 h 5 min`, `40 s`: the largest unit and the one below it."""
    rest = max(0, round(seconds))
    parts: list[tuple[int, str]] = []
    for unit, length in _UNITS:
        if parts or rest >= length or unit == "s":
            number, rest = divmod(rest, length)
            parts.append((number, unit))
    return " ".join(f"{number} {unit}" for number, unit in parts[:2] if number or len(parts) == 1) or "0 s"


def size(number: float) -> str:
    """`1.5 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
