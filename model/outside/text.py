"""Text of messages: numbers of things, and what strangers wrote, as it may be shown."""

import re
import unicodedata
from typing import Final

_CONTROLLING: Final = ("Cc", "Cs", "Zl", "Zp")
"""Categories of characters that move a cursor or end a line, and of bytes in no known encoding."""
_REORDERING: Final = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Turn the direction of what follows, so that a name reads as another."""

_SCHEME: Final = r"[A-Za-z][A-Za-z0-9+.-]+:/"
"""Begins an address; `pathlib.Path` keeps one slash of two."""
_LOGIN: Final = re.compile(rf"({_SCHEME}+)[^\s'\"`]*@")
_QUERY: Final = re.compile(rf"({_SCHEME}+[^\s'\"`?]*)\?[^\s'\"`]*[^\s'\"`:;,.)]")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 image`, `2,000 images`, `1 process`, `2 processes`."""
    several = plural or noun + ("es" if noun.endswith(("s", "ch", "sh", "x")) else "s")
    return f"{number:,} {noun if number == 1 else several}"


def exact_number(value: float) -> str:
    """Short where that is the number, else with all its digits: two numbers never look the same."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def is_fit_to_print(text: str) -> bool:
    """Whether a name can be shown: it controls no terminal. Spaces and joiners of every script are fit."""
    return text.isprintable() or not any(map(_is_unfit, text))


def printable(text: object) -> str:
    """Text in one line, with `\\n`, `\\x1b` and the like in place of what is not fit to print."""
    shown = str(text)
    if is_fit_to_print(shown):
        return shown
    return "".join(ascii(character)[1:-1] if _is_unfit(character) else character for character in shown)


def message_lines(text: str) -> str:
    """A message of one or several lines as a terminal may show it.

    Lines after the first are indented: whatever a name in the message holds, no line passes for another message.
    Addresses have no login and no query: whatever quotes what a user typed, it shows no password.
    """
    first, *others = re.split(r"\r?\n", without_logins(text))
    return "\n".join([printable(first), *(f"  {printable(line)}" for line in others)])


def without_logins(text: str) -> str:
    """A text with `…` in place of logins and queries of addresses, also of those that became paths (`s3:/…`)."""
    return _QUERY.sub(r"\1?…", _LOGIN.sub(r"\1…@", text))


def is_address(path: object) -> bool:
    """Whether a path was an address, such as `s3://bucket/run`, which no local folder is called."""
    return re.match(_SCHEME, str(path)) is not None


def normal(name: str) -> str:
    """A name with each letter composed (NFC), as names are stored: file systems and programs differ in it."""
    return unicodedata.normalize("NFC", name)


def _is_unfit(character: str) -> bool:
    return unicodedata.category(character) in _CONTROLLING or character in _REORDERING
