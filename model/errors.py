"""The exception for what a user got wrong, and its one kind that may be nobody's mistake."""

from collections.abc import Sequence


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
