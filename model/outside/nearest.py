"""What somebody probably meant: the nearest of the names that there are, told alike everywhere."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Final

MOST_LISTED: Final = 12
"""Names that a message lists; more are left to where they are listed."""
_LONGEST: Final = 100
"""Characters that are compared: the time goes with their square."""
_CUTOFF: Final = 0.6
_SHORT: Final = 5
_CUTOFF_OF_SHORT: Final = 0.76
"""Of names with fewer characters: one of three that differs makes another word, as gpu and cpu."""


def nearest(found: str, known: Iterable[str], cutoff: float | None = None) -> str | None:
    """The known name that was probably meant; None where none is near.

    Upper and lower case are alike, and so are `-` and `_`. The beginning of one name alone counts
    as near, and a long beginning of several as that of the first.

    Args:
        cutoff: how alike names must be, from 0 to 1; None: 0.6, or 0.76 where the name is short.
    """
    by_plain = {_plain(name): name for name in reversed(list(known))}
    wanted = _plain(found)[:_LONGEST]
    if wanted in by_plain:
        return by_plain[wanted]
    begun = [name for plain, name in by_plain.items() if len(wanted) > 1 and plain.startswith(wanted)]
    if len(begun) == 1 or (begun and len(wanted) >= _SHORT):
        return begun[-1]
    swapped = [name for plain, name in by_plain.items() if sorted(plain) == sorted(wanted)]
    if swapped:
        return swapped[-1]
    if cutoff is None:
        cutoff = _CUTOFF_OF_SHORT if len(wanted) < _SHORT else _CUTOFF
    close = get_close_matches(wanted, by_plain, n=1, cutoff=cutoff)
    return by_plain[close[0]] if close else None


def expected_name(found: str, known: Collection[str], listed: str | None = None, what: str | None = None) -> str:
    """`expected one of red, green, blue; did you mean green?`: the end of a message on a name that is not known.

    Args:
        known: in the order in which they are listed.
        listed: where many names are listed, such as `ditmoe models`; None: in the message, however many.
        what: what they are, where there are too many to list, such as `a preset`.
    """
    if len(known) > MOST_LISTED and listed is not None:
        words = f"expected {what or 'one'} of those that {listed} lists"
    else:
        words = f"expected {one_of(known)}"
    return f"{words}{meant(found, known)}"


def meant(found: str | Collection[str], known: Collection[str], cutoff: float | None = None) -> str:
    """`; did you mean green?`, or nothing.

    Args:
        found: one name, or several.
        cutoff: as of `nearest`.
    """
    each = [found] if isinstance(found, str) else found
    near = dict.fromkeys(name for text in each if (name := nearest(text, known, cutoff)) is not None)
    return f"; did you mean {', '.join(near)}?" if near else ""


def one_of(names: Collection[str]) -> str:
    """`red or green`, `one of red, green, blue`."""
    return " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
