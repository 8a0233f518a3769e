"""Where the figures of a run's evaluations are shown: TensorBoard, and the boards that the run itself has.

A set of settings is a run of its own beside training's on each: in the event files of training, TensorBoard would
read on in the youngest alone, and W&B takes steps in their order from one process.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

from ditmoe.launcher.configuration.sections import LoggerName
from ditmoe.launcher.loggers.aside import BoardAside
from ditmoe.launcher.loggers.beside import handed_on, key_of
from ditmoe.launcher.loggers.board import Outcome
from ditmoe.launcher.loggers.opening import ASIDE
from ditmoe.launcher.training.evaluations import StoredEvaluation
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.sampling.drawing.picture import image_grid

FIGURES: Final = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception Score",
    "recognised": "recognised - share",
}
"""Key of a figure → its name on every board, under `evaluation/`."""
IMAGES_TAG: Final = "evaluation/images"
_WIDEST: Final = 1024
"""Pixels of a side of the grid of images, about."""
_MOST_ACROSS: Final = 8


def figures_of(one: StoredEvaluation) -> dict[str, float | None]:
    """Each of `FIGURES` that the evaluation has; None for the others."""
    figures = {key: one.figure(key) for key in FIGURES}
    judge = one.figures.get("recogniser")
    if isinstance(judge, Mapping):
        figures["recognised"] = judge.get("accuracy")
    return figures


class _Board(Protocol):
    """One place that shows them; it is opened with the first figure that it does not have yet."""

    there: set[tuple[str, int]]
    """(name, step) of all that it has."""

    def figures(self, step: int, values: Mapping[str, float]) -> None: ...
    def image(self, name: str, image_HWC: NDArray[np.uint8], step: int) -> None: ...
    def problem(self) -> str | None: ...
    def close(self, outcome: Outcome) -> None: ...


class EvaluationBoards:
    """The boards of the evaluations with one set of settings.

    Args:
        folder: of the run.
        name: of the settings.
        loggers: of the run.
    """

    def __init__(self, folder: RunFolder, name: str, loggers: tuple[LoggerName, ...]) -> None:
        self._boards: list[_Board] = [_EventFiles(folder.tensorboard / name)]
        self._boards += [_Aside(kind, folder, name) for kind in ASIDE if kind in loggers]

    def write(self, one: StoredEvaluation, samples: Path) -> None:
        """Write what is not there yet of an evaluation's figures, and its first images."""
        found = {
            f"evaluation/{FIGURES[key]}": value for key, value in figures_of(one).items() if value is not None
        }
        for board in self._boards:
            new = {name: value for name, value in found.items() if (name, one.step) not in board.there}
            if new:
                board.figures(one.step, new)
                board.there |= {(name, one.step) for name in new}
        without = [board for board in self._boards if (IMAGES_TAG, one.step) not in board.there]
        if without and samples.is_file():
            images_NHWC = first_images(samples)
            columns = min(_across(images_NHWC.shape[1]), len(images_NHWC))
            picture = np.asarray(image_grid(images_NHWC, columns=columns)) if columns else None
            for board in without:
                if picture is not None:
                    board.image(IMAGES_TAG, picture, one.step)
                board.there.add((IMAGES_TAG, one.step))

    def problems(self) -> list[str]:
        """What is wrong, each told once."""
        return [problem for board in self._boards if (problem := board.problem()) is not None]

    def close(self, outcome: Outcome) -> None:
        """Finish what is open."""
        for board in self._boards:
            board.close(outcome)


class _EventFiles:
    """Those of TensorBoard, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.there = written_points(folder)
        self._writer: SummaryWriter | None = None

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._open().add_scalar(name, value, step)
        self._open().flush()

    def image(self, name: str, image_HWC: NDArray[np.uint8], step: int) -> None:
        self._open().add_image(name, image_HWC, step, dataformats="HWC")
        self._open().flush()

    def problem(self) -> str | None:
        return None  # it is raised

    def close(self, outcome: Outcome) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder))
        return self._writer


class _Aside:
    """A board in a process of its own."""

    def __init__(self, kind: LoggerName, folder: RunFolder, name: str) -> None:
        self._kind, self._folder, self._name = kind, folder, name
        self.there = handed_on(folder.boards, key_of(kind, name))
        self._board: BoardAside | None = None
        self._left: str | None = None

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        self._open().figures(step, values)

    def image(self, name: str, image_HWC: NDArray[np.uint8], step: int) -> None:
        self._open().image(name, image_HWC, step)

    def problem(self) -> str | None:
        if self._board is None:
            left, self._left = self._left, None
            return left
        return self._board.problem()

    def close(self, outcome: Outcome) -> None:
        if self._board is not None:
            self._left = self._board.close(outcome)
            self._board = None

    def _open(self) -> BoardAside:
        if self._board is None:
            run = self._folder.path.resolve().name
            self._board = BoardAside(self._kind, self._folder.boards, run, self._name)
        return self._board


def written_points(folder: Path) -> set[tuple[str, int]]:
    """(tag, step) of all that a folder's event files hold."""
    return {
        (value.tag, event.step)
        for file in sorted(folder.glob("events.out.tfevents.*"))
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }


def first_images(samples: Path) -> NDArray[np.uint8]:
    """As many of the first images of a `samples.npz` as a picture has room for, uint8 [n, H, W, 3]."""
    with zipfile.ZipFile(samples) as archive, archive.open("arr_0.npy") as member:
        npy_format.read_magic(member)
        shape, _, dtype = npy_format.read_array_header_1_0(member)
        assert dtype == np.uint8 and len(shape) == 4, (dtype, shape)
        count = min(shape[0], _across(shape[1]) ** 2)
        content = member.read(count * int(np.prod(shape[1:])))
    return np.frombuffer(content, dtype=np.uint8).reshape(count, *shape[1:])


def _across(size: int) -> int:
    return max(2, min(_MOST_ACROSS, _WIDEST // size))
