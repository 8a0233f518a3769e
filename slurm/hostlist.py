"""The names of nodes in Slurm's short form: `gpu[01-03,7],login` is gpu01, gpu02, gpu03, gpu7 and login."""

import itertools
import re
from collections.abc import Iterator
from typing import Final

from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import printable

MOST_HOSTS: Final = 65536
"""Of one list: as many as a cluster of Slurm may have."""

_NAME: Final = re.compile(r"(?:[^\[\],]+|\[[^\[\]]+\])+")
"""One entry: plain text and brackets in any order."""
_PART: Final = re.compile(r"\[([^\[\]]+)\]|([^\[\],]+)")
_RANGE: Final = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def hosts_of(hostlist: str) -> list[str]:
    """The nodes of a list, in its order, each as often as it stands there.

    Args:
        hostlist: as Slurm writes it: entries with commas between them, each with ranges in brackets or without.

    Raises:
        UserError: it is no such list, or has more than `MOST_HOSTS` nodes.
    """
    hosts: list[str] = []
    for entry in _entries(hostlist):
        parts = [_numbers(inside, hostlist) if inside else [plain] for inside, plain in _PART.findall(entry)]
        hosts += itertools.islice(map("".join, itertools.product(*parts)), MOST_HOSTS + 1)
        if len(hosts) > MOST_HOSTS:
            raise UserError(f"{_shown(hostlist)}: more than {MOST_HOSTS} nodes; expected a cluster's")
    return hosts


def _entries(hostlist: str) -> Iterator[str]:
    """The parts between the commas that stand outside brackets."""
    place = 0
    while True:
        match = _NAME.match(hostlist, place)
        end = match.end() if match else place
        if match is None or hostlist[end : end + 1] not in ("", ","):
            raise UserError(f"{_shown(hostlist)}: no list of nodes; expected names such as node1,gpu[01-16,20]")
        yield match[0]
        if end == len(hostlist):
            return
        place = end + 1


def _numbers(inside: str, hostlist: str) -> list[str]:
    """`01-03,7` as 01, 02, 03 and 7: the first number of a range says how many digits all of it have."""
    numbers: list[str] = []
    for text in inside.split(","):
        match = _RANGE.fullmatch(text)
        if match is None:
            raise UserError(f"{_shown(hostlist)}: {printable(text)!r} in brackets; expected 7 or 01-16")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + MOST_HOSTS:
            raise UserError(f"{_shown(hostlist)}: {text} in brackets; expected up to {MOST_HOSTS} rising numbers")
        numbers += (f"{number:0{len(match[1])}d}" for number in range(first, last + 1))
    return numbers


def _shown(hostlist: str) -> str:
    return f"nodes {printable(hostlist if len(hostlist) <= 80 else f'{hostlist[:77]}...')!r}"
