"""What the program can say: the texts in its source, with gaps where values are put in."""

import ast
from collections.abc import Sequence
from functools import cache
from typing import Final

from tests.docs.pages import ROOT

FOLDERS: Final = ("launcher", "slurm", "sampling", "parallel", "data", "model")
_GAP: Final = None
LEAST: Final = 0.6
"""The share of a quotation that has to be text of the source, and not of a gap."""

Template = tuple[str | None, ...]
"""Pieces of text, and None where a value stands."""


@cache
def templates() -> tuple[Template, ...]:
    """Every text in the source of the program, but for those that document it."""
    found: set[Template] = set()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    found.add(_template(node))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
                    found.add((node.value,))
    return tuple(found)


def _template(node: ast.JoinedStr) -> Template:
    pieces: list[str | None] = []
    for value in node.values:
        if isinstance(value, ast.Constant):
            pieces.append(str(value.value))
        elif not pieces or pieces[-1] is not _GAP:
            pieces.append(_GAP)
    return tuple(pieces)


def can_be_said(quotation: str) -> bool:
    """Whether each piece of a quotation, cut at its dots, is a part of something that the program says."""
    pieces = [piece.strip(" :;,()") for piece in quotation.split("…")]
    return all(any(_holds(template, piece) for template in templates()) for piece in pieces if piece)


def _holds(template: Template, text: str) -> bool:
    """Whether a text is a part of what a template becomes, most of it by the template's own words."""
    for place, piece in enumerate(template):
        if piece is _GAP:
            continue
        if text in piece:
            return True
        for start in range(len(text)):
            literal = _suffix_and_more(template, place, text, start)
            if literal is not None and literal >= LEAST * len(text) and (start == 0 or place > 0):
                return True
    return False


def _suffix_and_more(template: Sequence[str | None], place: int, text: str, start: int) -> int | None:
    """The most letters of the template in `text[start:]`, which begins within, or at, the piece at `place`."""
    piece = template[place]
    assert piece is not None
    rest = text[start:]
    if start > 0:  # what stands before is of a gap
        if not rest.startswith(piece):
            return len(rest) if piece.startswith(rest) else None
        more = _after(template, place + 1, rest[len(piece) :])
        return None if more is None else len(piece) + more
    for cut in range(len(piece)):
        if rest.startswith(piece[cut:]):
            more = _after(template, place + 1, rest[len(piece) - cut :])
            if more is not None:
                return len(piece) - cut + more
    return None


def _after(template: Sequence[str | None], place: int, text: str) -> int | None:
    """The most letters of the template in a text that begins with the gap at `place`; None: it does not fit."""
    if not text:
        return 0
    if place >= len(template):
        return None
    best: int | None = 0 if place + 1 >= len(template) else None
    if place + 1 < len(template):
        piece = template[place + 1]
        assert piece is not None
        for length in range(len(text) + 1):
            rest = text[length:]
            if piece.startswith(rest):
                best = max(best or 0, len(rest))
            elif rest.startswith(piece):
                more = _after(template, place + 2, rest[len(piece) :])
                if more is not None:
                    best = max(best or 0, len(piece) + more)
    return best
