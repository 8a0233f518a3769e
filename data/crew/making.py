"""Who makes the parts of some work: processes that are alike and share a folder, or the workers of a crew.

A program that works in parts names each stage of its work, and has the parts of one after another made by a
`Make`. It neither knows nor cares who makes them. A worker builds the same parts from plain data, by a function
that the program gives beside them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from ditmoe.data.crew.tasks import AnyParts, Task
from ditmoe.data.storage.parts import Progress, make_parts
from ditmoe.model.errors import UserError

if TYPE_CHECKING:
    from ditmoe.data.crew.leader import Crew


def _nothing(done: int) -> None:
    """Takes a progress that nobody looks at."""


class Make(Protocol):
    """Has the parts of a stage made that are not there."""

    def __call__(
        self, stage: str, parts: AnyParts, *, only: Sequence[int] | None = None, on_progress: Progress = _nothing
    ) -> object:
        """Return when all parts are there.

        Args:
            stage: its name.
            parts: as this process has them.
            only: these parts; None: all.
            on_progress: gets the size of the finished parts.

        Raises:
            UserError: a part cannot be made.
        """


def by_ranks(rank: int = 0, ranks: int = 1) -> Make:
    """Processes that all call this make the parts by themselves, each beginning at another place."""

    def make(
        stage: str, parts: AnyParts, *, only: Sequence[int] | None = None, on_progress: Progress = _nothing
    ) -> int:
        return make_parts(parts, rank=rank, ranks=ranks, only=only, on_progress=on_progress)

    return make


ALONE: Final = by_ranks()
"""This process makes all parts that nobody else is making."""


def by_crew(crew: "Crew", builder: Callable[[Mapping[str, Any]], AnyParts], request: Mapping[str, Any]) -> Make:
    """The workers of a crew make the parts, while this process leads.

    Args:
        builder: request → parts, in a worker; a function at the top of one of our modules.
        request: what it is given, with the name of the stage as `stage`.
    """

    def make(
        stage: str, parts: AnyParts, *, only: Sequence[int] | None = None, on_progress: Progress = _nothing
    ) -> int:
        task = Task.of(builder, {**request, "stage": stage})
        return crew.make(task, parts, only=only, on_progress=on_progress)

    return make


def stage_of(request: Mapping[str, Any]) -> tuple[str, str]:
    """The stage that a builder is asked for; and the rest, which is that of all stages, as JSON to remember."""
    rest = {key: value for key, value in request.items() if key != "stage"}
    return str(request["stage"]), json.dumps(rest, sort_keys=True)


def check_same(where: object, found: Mapping[str, str], told: Mapping[str, str]) -> None:
    """UserError where a worker finds other files than whoever leads it."""
    for name, value in found.items():
        if value != told[name]:
            raise UserError(
                f"{where}: {name} is {value} where this worker looks, expected {told[name]}: "
                "workers must see the files of whoever leads them under the same names"
            )


def absolute(path: Path | None) -> Path | None:
    """A path as workers in other folders find it."""
    return None if path is None else path.absolute()


def absolute_place(place: str) -> str:
    """The same of a place of shards, which may be no path."""
    return str(Path(place).absolute()) if Path(place).exists() else place
