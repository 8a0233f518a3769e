"""Lets a process be killed at one of its own moments."""

import os
import signal
from collections.abc import Callable


class Mortal:
    """Counts the calls of the functions that it is given, and kills its process at the start of one of them."""

    def __init__(self, dies_at: int) -> None:
        """Be killed at call number `dies_at`, from 1 on."""
        self.moments = 0
        self._dies_at = dies_at

    def __call__(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            self.moments += 1
            if self.moments == self._dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call
