"""Names that strangers wrote, and which may become a file's name, a word of a command, or a path in a tar."""

import re
import unicodedata
from typing import Final

LONGEST: Final = 255
"""Bytes of a file's name."""
OTHERS_ALLOWED: Final = "._+=@,%-"
"""Characters of a file's name besides letters and digits: no shell, and no tool with remote paths, reads them."""
_PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")


def is_plain_file_name(file: str, suffix: str) -> bool:
    """Whether a name may be asked of any place: letters, digits and ``._+=@,%-``, beginning with a letter, a digit
    or ``_``, without ``..``.

    It is put into paths, addresses and commands, and a command may hand it to a second shell on another machine,
    where the quotes of the first are gone.
    """
    return (
        file.endswith(suffix)
        and len(file) > len(suffix)
        and len(file.encode(errors="replace")) <= LONGEST
        and ".." not in file
        and (file[0] == "_" or unicodedata.category(file[0])[0] in "LN")
        and all(letter in OTHERS_ALLOWED or unicodedata.category(letter)[0] in "LMN" for letter in file)
    )


def is_plain_key(key: str) -> bool:
    """Whether a sample's key may be taken over into a new tar: no program can take it for a path elsewhere."""
    return _PLAIN_KEY.fullmatch(key) is not None
