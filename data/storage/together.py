"""Works in parts over the same things, such as images, made in one pass over these."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ditmoe.data.storage.parts import Parts


def together(
    folder: Path,
    works: Sequence[Parts[Any, Any, Any]],
    make: Callable[[int, Sequence[int]], Sequence[Any]],
) -> Parts[Any, Any, Any]:
    """Parts of which each makes the part of that number of every work, where its file is not there.

    The works stay apart, each with files of its own, as if it had been made alone. The file of a part of all is an
    empty mark that its works were made.

    Args:
        folder: of the marks.
        works: of equally many parts.
        make: makes a part, from its number and those of the works that lack it, for these works.

    Returns:
        For one work that work itself.
    """
    if len(works) == 1:
        return works[0]
    assert len({len(work.names) for work in works}) == 1, [len(work.names) for work in works]

    def make_missing(part: int) -> None:
        missing = [number for number, work in enumerate(works) if not work.path(part).exists()]
        if missing:
            for number, made in zip(missing, make(part, missing), strict=True):
                works[number].place(part, made)

    return Parts(
        folder,
        [f"{name}.made" for name in works[0].names],
        make_missing,
        lambda nothing, file: None,
        lambda part: None,
        lambda found: None,
        sizes=works[0].sizes,
    )
