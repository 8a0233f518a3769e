"""Which of a run's checkpoints are the best by a metric: the training loss, or what `ditmoe evaluate` found."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from ditmoe.data.storage.files import open_regular
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import read_info
from ditmoe.parallel.config import CheckpointConfig

LOWER_IS_BETTER: Final = ("loss", "fid", "sfid")
"""Of the rest of `checkpoint.best_metric` higher is better."""


class BestCheckpoints:
    """The steps of the best checkpoints of a run, as `checkpoint.keep_best` and `checkpoint.best_metric` say."""

    def __init__(self, folder: RunFolder, retention: CheckpointConfig, checkpoint_every: int) -> None:
        self._folder = folder
        self._count = retention.keep_best
        self._metric = retention.best_metric
        self._window = checkpoint_every

    def __call__(self, paths: Sequence[Path]) -> list[int]:
        """Of these checkpoints, those to keep, the best first; of two equally good ones the later is better."""
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
    found = sorted(_figures(evaluations, metric), key=lambda one: one[0])
    if not found:
        return {}
    settings = found[-1][1]
    by_weights = {weights: figure for _, same, weights, figure in found if same == settings}
    steps: dict[int, float] = {}
    for path in paths:
        try:
            info = read_info(path)
        except UserError:
            continue  # damaged: no weights that an evaluation can be of
        figure = by_weights.get(info.fingerprint)
        if figure is not None:
            steps[info.step] = figure
    return steps


def _figures(evaluations: Path, metric: str) -> Iterator[tuple[float, str, str, float]]:
    """When it was written, the settings, the checkpoint's fingerprint and the figure, of each evaluation with one.

    What cannot be read as one is passed over: no evaluation may end a run.
    """
    for file in sorted(evaluations.glob("*/metrics.json")):
        try:
            with open_regular(file) as stored:
                content = json.loads(stored.read())
            evaluation = content["evaluation"]
            written = file.stat().st_mtime
            for name, result in sorted(content["results"].items()):
                figure = result.get(metric)
                if isinstance(figure, int | float) and math.isfinite(figure):
                    fingerprint = str(evaluation["weights"]).removesuffix(f"-{evaluation['which']}")
                    yield written, _settings(evaluation, name, result), fingerprint, float(figure)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue


def _settings(evaluation: dict[str, Any], features: str, result: dict[str, Any]) -> str:
    """What two figures must have in common to be compared."""
    shared = {key: evaluation[key] for key in ("which", "sampler", "count", "labels")}
    measured = [features, result["network"]["fingerprint"], result["real"]["fingerprint"]]
    return json.dumps([shared, measured], sort_keys=True)
