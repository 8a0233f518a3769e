"""The board that is written beside training's other files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from ditmoe.launcher.loggers.board import Outcome


class TensorBoard:
    """A `Board` of event files; what a disk refuses is raised, as of the run's other files.

    Args:
        folder: of the event files.
        step: steps that are done. What an interrupted run wrote of later ones, which are now repeated, is hidden;
            at the start that is all of it, the configuration among it, which is shown at step 0.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """As `Board`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, name: str, image_HWC: NDArray[np.uint8], step: int) -> None:
        """As `Board`."""
        self._writer.add_image(name, image_HWC, step, dataformats="HWC")
        self._writer.flush()

    def text(self, name: str, text: str, step: int) -> None:
        """As `Board`."""
        self._writer.add_text(name, "\n".join("    " + line for line in text.splitlines()), step)
        self._writer.flush()

    def close(self, outcome: Outcome) -> None:
        """As `Board`; nothing is left undone, and how the run ended is in its log."""
        self._writer.close()
