"""The exception for what a user got wrong, and its kinds that the program tells apart."""

from collections.abc import Sequence
from pathlib import Path


class UserError(Exception):
    """Wrong input: its text is all that the user sees, and the command exits with code 2.

    The text names the key, file or sample, what was found there and what was expected.
    """


class MissingProcessesError(UserError):
    """Other processes of the run did not come, or went: a node may have failed, and no input need be wrong.

    The command exits with code 1, so that a supervisor tries again.

    Args:
        message: for the user.
        ranks: those that did not come; none where it is not known which.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class UnwritableError(UserError):
    """A file could not be written: a full disk, no permission. Its cause is the OSError."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: could not be written: {self.reason}"
