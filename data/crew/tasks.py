"""What a worker of a crew is told to do: a part of work that a function of this package builds from plain data."""

import faulthandler
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch

from ditmoe.data.storage.parts import Parts
from ditmoe.model.errors import UserError

PACKAGE: Final = "ditmoe."
TALLY_VARIABLE: Final = "DITMOE_TALLY"
"""Environment variable of a worker: the file that gets a byte for each part that it has made."""
AnyParts = Parts[Any, Any, Any]


@dataclass(frozen=True)
class Task:
    """Work in parts, in a form that goes from one process to another."""

    builder: str
    """`ditmoe.MODULE:FUNCTION`, which makes the `Parts` from the request."""
    request: str
    """What it is given, as JSON."""

    @classmethod
    def of(cls, builder: Callable[[Mapping[str, Any]], AnyParts], request: Mapping[str, Any]) -> "Task":
        """The task of a function at the top of one of our modules, and what it is given."""
        assert builder.__module__.startswith(PACKAGE), builder
        return cls(f"{builder.__module__}:{builder.__qualname__}", json.dumps(request))

    def parts(self) -> AnyParts:
        """Build the parts. UserError as the function raises it."""
        module, _, name = self.builder.partition(":")
        assert module.startswith(PACKAGE), self.builder
        build: Callable[[Mapping[str, Any]], AnyParts] = getattr(importlib.import_module(module), name)
        return build(json.loads(self.request))


class Outcome(NamedTuple):
    """What became of a part."""

    mistake: str | None = None
    """The message of a UserError."""
    failure: str | None = None
    """The traceback of a fault of the program."""


def make_part(builder: str, request: str, part: int, seconds: float) -> tuple[str | None, str | None]:
    """Make a part in a worker, where its file is not there.

    A worker that takes longer than `seconds` prints where it is and ends itself: heartbeats go on while a part
    hangs, so nobody else would notice. So does one whose GPU fails, with which a process can do no more. It is
    started anew, and the part is made again, perhaps elsewhere.

    Returns:
        An `Outcome`.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        parts = _built(Task(builder, request))
        if not parts.path(part).exists() and parts.make_one(part):
            _count()
        return Outcome()
    except UserError as error:
        return Outcome(mistake=str(error))
    except torch.AcceleratorError:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)
    except Exception:
        return Outcome(failure=traceback.format_exc())
    finally:
        faulthandler.cancel_dump_traceback_later()


def _count() -> None:
    """Put a part on the tally, for who watches the worker. A full disk stops no work here."""
    tally = os.environ.get(TALLY_VARIABLE)
    if tally:
        with suppress(OSError), open(tally, "ab") as file:
            file.write(b".")


@lru_cache(maxsize=1)
def _built(task: Task) -> AnyParts:
    """The parts of the task that this worker is at: its networks and indices are loaded once."""
    return task.parts()
