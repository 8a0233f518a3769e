"""Which of a run's checkpoints are the best by a metric: the training loss, or what `ditmoe evaluate` found."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ditmoe.data.storage.files import open_regular
from ditmoe.launcher.training.evaluations import LOWER_IS_BETTER, fingerprints, marked, stored_evaluations
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.parallel.config import CheckpointConfig


class BestCheckpoints:
    """The steps of the best checkpoints of a run, as `checkpoint.keep_best` and `checkpoint.best_metric` say.

    Those that `ditmoe evaluate --watch` has marked are among them, whatever the two keys are.
    """

    def __init__(self, folder: RunFolder, retention: CheckpointConfig, checkpoint_every: int) -> None:
        self._folder = folder
        self._count = retention.keep_best
        self._metric = retention.best_metric
        self._window = checkpoint_every

    def __call__(self, paths: Sequence[Path]) -> list[int]:
        """Of these checkpoints, those to keep: marked ones, then the best; of two equally good ones the later."""
        steps = marked(self._folder.evaluations, paths)
        return [*steps, *(step for step in self._by_metric(paths) if step not in steps)]

    def _by_metric(self, paths: Sequence[Path]) -> list[int]:
        if not self._count:
            return []
        if self._metric == "loss":
            steps = [int(path.name.removeprefix("step-")) for path in paths]
            figures = losses(self._folder.stats, steps, self._window)
        else:
            figures = evaluated(self._folder.evaluations, self._metric, paths)
        sign = 1 if self._metric in LOWER_IS_BETTER else -1
        return sorted(figures, key=lambda step: (sign * figures[step], -step))[: self._count]


def losses(stats: Path, steps: Sequence[int], window: int) -> dict[int, float]:
    """Step → mean of `loss` over the records of the last `window` steps up to it; left out where there is none."""
    records = [record for line in _whole_lines(stats) if (record := _step_and_loss(line)) is not None]
    found = {step: [loss for at, loss in records if step - window < at <= step] for step in steps}
    return {step: fmean(values) for step, values in found.items() if values}


def _step_and_loss(line: str) -> tuple[int, float] | None:
    """Of a record; None where it has no loss, or is damaged: no file of figures may end a run."""
    try:
        record = json.loads(line)
        return int(record["step"]), float(record["loss"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _whole_lines(file: Path) -> list[str]:
    """Lines of a file that another thread may be appending to."""
    if not file.is_file():
        return []
    with open_regular(file) as stored:
        text = stored.read().decode(errors="replace")
    return text.rpartition("\n")[0].splitlines()


def evaluated(evaluations: Path, metric: str, paths: Sequence[Path]) -> dict[int, float]:
    """Step → figure of exactly this checkpoint, of the evaluations with the settings of the latest with one."""
    found = sorted(
        (one for one in stored_evaluations(evaluations) if one.figure(metric) is not None),
        key=lambda one: one.written,
    )
    if not found:
        return {}
    by_weights = {one.weights: one.figure(metric) for one in found if one.settings == found[-1].settings}
    figures = {step: by_weights.get(weights) for weights, step in fingerprints(paths).items()}
    return {step: figure for step, figure in figures.items() if figure is not None}
