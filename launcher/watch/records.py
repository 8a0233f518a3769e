"""What following a run leaves: a line per checkpoint, figures on boards, a picture of FID, the best marked.

All of it is made of the evaluations that are stored, and lacks nothing that one of them has: a kill at any moment,
or a repeated start, neither loses a figure nor writes one twice.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from ditmoe.data.storage.files import open_appending, open_regular, replacing
from ditmoe.launcher.configuration.sections import LoggerName
from ditmoe.launcher.loggers.board import Outcome
from ditmoe.launcher.training.evaluations import (
    StoredEvaluation,
    best_of,
    fingerprints,
    mark_best,
    stored_evaluations,
)
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.launcher.watch.boards import EvaluationBoards, figures_of
from ditmoe.parallel.checkpoint.folder import checkpoints
from ditmoe.sampling.evaluation.keeping import SAMPLES_FILE

WATCH_FILE: Final = "watch.jsonl"
"""In the run's `evaluations/`: one object per checkpoint that was scored, or passed over."""
_COLUMNS: Final = {
    "step": 10,
    "images": 13,
    "FID": 12,
    "floor": 12,
    "KID": 12,
    "precision": 12,
    "recall": 12,
    "recognised": 12,
}
HEADER: Final = "".join(f"{name:>{width}}" for name, width in _COLUMNS.items())


class Records:
    """The records of the evaluations with some settings; a context manager."""

    def __init__(self, folder: RunFolder, metric: str, loggers: tuple[LoggerName, ...] = ()) -> None:
        """Open nothing yet.

        Args:
            metric: by which the best is marked.
            loggers: of the run; TensorBoard always has the figures.
        """
        self._folder = folder
        self.metric = metric
        """By which the best is marked."""
        self._loggers = loggers
        self._boards: dict[str, EvaluationBoards] = {}
        self.outcome: Outcome = "stopped"
        """How the watch ends, as boards show it."""

    def close(self) -> None:
        """Finish the event files and the boards."""
        for board in self._boards.values():
            board.close(self.outcome)

    def problems(self) -> list[str]:
        """What is wrong with boards, each told once."""
        return [problem for board in self._boards.values() for problem in board.problems()]

    def follow(self, settings: str) -> tuple[list[StoredEvaluation], StoredEvaluation | None]:
        """Bring all records up to what is stored with these settings.

        Returns:
            What was not on record yet, by step, and the best of the checkpoints that are still there.
        """
        found = evaluations_of(self._folder.evaluations, settings)
        if not found:
            return [], None
        name = found[-1].settings_name
        known = {
            (line.get("evaluation"), line.get("settings"))
            for line in read_lines(self.file)
            if "evaluation" in line
        }
        new = [one for one in found if (one.id, name) not in known]
        there = fingerprints(checkpoints(self._folder.path))
        best = best_of([one for one in found if one.weights in there], self.metric)
        if best is not None:
            mark_best(self._folder.evaluations, best, self.metric)
        board = self._boards.get(name)
        if board is None:
            board = self._boards[name] = EvaluationBoards(self._folder, f"evaluation-{name}", self._loggers)
        for one in found:
            board.write(one, self._folder.evaluations / one.id / SAMPLES_FILE)
        draw_curve(self._folder.evaluations / f"watch-{name}.png", found, best)
        for one in new:
            figures = {key: value for key, value in figures_of(one).items() if value is not None}
            floor = one.figure("fid_floor")
            self.append(
                one.step,
                "scored",
                images=one.images,
                evaluation=one.id,
                settings=name,
                **figures,
                **({} if floor is None else {"fid_floor": floor}),
            )
        return new, best

    @property
    def file(self) -> Path:
        """Where the lines are."""
        return self._folder.evaluations / WATCH_FILE

    def append(self, step: int, outcome: str, **facts: Any) -> None:
        """Write what became of a checkpoint: `scored`, `removed`, `damaged` or `failed`, once."""
        told = {"step": step, "outcome": outcome, **facts}
        if any(
            told == {key: value for key, value in line.items() if key != "time"} for line in read_lines(self.file)
        ):
            return
        line = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), **told}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open_appending(self.file) as file:
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def evaluations_of(evaluations: Path, settings: str) -> list[StoredEvaluation]:
    """The evaluations with some settings, by step; of two of one step the later."""
    same = [one for one in stored_evaluations(evaluations) if one.settings == settings]
    return [*{one.step: one for one in sorted(same, key=lambda one: (one.step, one.written))}.values()]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines; what a kill cut short is passed over."""
    try:
        with open_regular(path) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def line_of(one: StoredEvaluation, best: bool) -> str:
    """A line of the table under `HEADER`."""
    figures = figures_of(one)
    judged = figures["recognised"]
    shown = [f"{one.step:,}", "–" if one.images is None else f"{one.images:,}"]
    values = (figures["fid"], one.figure("fid_floor"), *(figures[key] for key in ("kid", "precision", "recall")))
    shown += ["–" if value is None else f"{value:.4g}" for value in values]
    shown.append("–" if judged is None else f"{judged:.2%}")
    cells = (f"{text:>{width}}" for text, width in zip(shown, _COLUMNS.values(), strict=True))
    return "".join(cells) + ("   best" if best else "")


def draw_curve(path: Path, found: Sequence[StoredEvaluation], best: StoredEvaluation | None) -> None:
    """Draw FID over training steps, with its floor and the best, and precision and recall below, as PNG."""
    figure = Figure((6.4, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    fid = [(one.step, value) for one in found if (value := one.figure("fid")) is not None]
    above.plot([step for step, _ in fid], [value for _, value in fid], color="#0072b2", marker="o", markersize=4)
    floors = [value for one in found if (value := one.figure("fid_floor")) is not None]
    if floors:
        above.axhline(floors[-1], color="0.5", linestyle="--", linewidth=1, label="floor")
    if best is not None and (value := best.figure("fid")) is not None:
        above.plot([best.step], [value], "o", color="#d55e00", label=f"best: step {best.step:,}")
    if above.get_legend_handles_labels()[0]:
        above.legend(frameon=False)
    if fid and min(value for _, value in fid) > 0 and max(v for _, v in fid) > 10 * min(v for _, v in fid):
        above.set_yscale("log")
    above.set_ylabel("FID")
    for key, colour in (("precision", "#009e73"), ("recall", "#cc79a7")):
        points = [(one.step, value) for one in found if (value := one.figure(key)) is not None]
        if points:
            below.plot([s for s, _ in points], [v for _, v in points], color=colour, marker="o", ms=4, label=key)
    if below.get_legend_handles_labels()[0]:
        below.legend(frameon=False)
    below.set_xlabel("training steps")
    for panel in (above, below):
        panel.grid(visible=True, color="0.9", linewidth=0.7)
    figure.suptitle(found[-1].settings_name.rpartition("-")[0], fontsize=9, parse_math=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
