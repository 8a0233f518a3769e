"""Samples that cannot be used, where whole sources are read: named, counted, and no more than its policy lets."""

from typing import Final

from ditmoe.data.stream.config import SourceConfig
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted

BEFORE_A_RUN: Final = (
    "(before a run is begun, `ditmoe data index FOLDER --check-images --skip-unreadable` leaves it out for all)"
)
"""Ends advice about a sample that cannot be used."""


class LeftOut:
    """What was passed over of a source, by the policy that its training goes by (`on_error`, `skip_budget`)."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self.count = 0
        """Samples."""
        self.lines: list[str] = []
        """Place and reason of each, or of a whole shard."""

    def add(self, where: str, reason: str, samples: int = 1) -> None:
        """Pass a sample over, or all of a shard. UserError where the policy is to stop, or the budget is spent."""
        self.add_lines(samples, [f"{where}: {reason}"])

    def add_lines(self, samples: int, lines: list[str]) -> None:
        """Count what others passed over, such as those who filled a cache. UserError as of `add`."""
        if lines and self._config.on_error == "stop":
            raise UserError(f"{lines[0]}; --on-error skip leaves out what cannot be used {BEFORE_A_RUN}")
        self.count += samples
        self.lines += lines
        if self.count > self._config.skip_budget:
            raise UserError(
                f"{self._config.shown}: {counted(self.count, 'sample')} cannot be used, and skip_budget is "
                f"{self._config.skip_budget:,}; the last of them: {self.lines[-1]}"
            )
