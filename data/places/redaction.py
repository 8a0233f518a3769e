"""What may be shown and kept of where data comes from: no passwords, no queries, no arguments of commands.

Whatever quotes a source or a place, in a message or in a file, uses these functions.
"""

import re
import shlex
from collections.abc import Mapping
from typing import Any, Final

PIPE: Final = "pipe:"
"""Begins the place of a source whose files a shell command writes."""
HIDDEN: Final = "…"
_IN_TEXT: Final = re.compile(r"(?<=://)[^\s/'\"]*@|(?<=[^\s'\"])\?[^\s'\"]+")
_LOGIN: Final = re.compile(r"(?<=://)(?:[^/?#]*|[^/?#@]*:(?!\d+/)[^?#]*)@")
"""`user:password@` of an address, also where the password has a slash in it."""


def masked(text: str) -> str:
    """A text without `user:password@` and without what follows `?` in addresses, on one line, fit to print."""
    text = " ".join(text.split())
    text = text if text.isprintable() else ascii(text)[1:-1]
    return _IN_TEXT.sub(lambda match: "" if match[0].endswith("@") else f"?{HIDDEN}", text)


def shown_place(path: str) -> str:
    """A source's `path` as it may be shown: `pipe:ssh …`, `https://…@host/shards?…`, or the path itself."""
    if path.startswith(PIPE):
        return f"{PIPE}{program_of(path.removeprefix(PIPE))} {HIDDEN}"
    if PIPE in path:  # a piece of a configuration: nobody can tell where in it the command ends
        return shown_place(path[: path.index(PIPE)]) + PIPE + HIDDEN
    if "://" not in path:
        return path
    address, query, _ = _LOGIN.sub(f"{HIDDEN}@", path).partition("?")
    return f"{address}?{HIDDEN}" if query else address


def program_of(command: str) -> str:
    """The program that a shell command starts; `…` where that cannot be told from the rest."""
    try:
        words = shlex.split(command)
    except ValueError:  # unbalanced quotes: the shell will say so
        words = []
    words = [word for word in words if not re.match(r"\w+=", word)]
    return words[0] if words else HIDDEN


def without_secrets(value: Any) -> Any:
    """Plain data, such as a configuration, with each of its texts as `shown_place` shows it."""
    if isinstance(value, str):
        return shown_place(value)
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return value


def has_secrets(value: Any) -> bool:
    """Whether plain data has anything that must not be shown."""
    if isinstance(value, Mapping):
        return any(map(has_secrets, value.values()))
    if isinstance(value, list | tuple):
        return any(map(has_secrets, value))
    return isinstance(value, str) and shown_place(value) != value
