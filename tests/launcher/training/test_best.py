"""Which checkpoints are the best: by the records' loss, or by evaluations that can be compared."""

import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest

from ditmoe.launcher.sweep import table as sweep_table
from ditmoe.launcher.training.best import BestCheckpoints, evaluated, losses
from ditmoe.launcher.training.evaluations import LOWER_IS_BETTER
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.launcher.watch import boards as watch_boards
from ditmoe.parallel.checkpoint.folder import checkpoint_path, read_info
from ditmoe.parallel.checkpoint.marker import MARKER
from ditmoe.parallel.config import CheckpointConfig
from tests.markers import change_marker

MODEL = {"depth": 1, "hidden": 32, "heads": 2, "patch": 2, "image_size": 8, "channels": 1, "num_classes": 2}


def checkpoint(run: Path, step: int) -> Path:
    """A checkpoint of which only the marker is there."""
    path = checkpoint_path(run, step)
    path.mkdir(parents=True)
    facts = {
        "format": 2,
        "step": step,
        "images": 0,
        "sums": {},
        "parts": ["ema"],
        "config": {"model": MODEL, "objective": {"kind": "ddpm"}},
        "dataset": {},
        "shapes": {"pos_embed": [1]},
        "files": {"ema/shard-00001.safetensors": {"bytes": 4, "sha256": f"{step:064d}"}},
    }
    (path / MARKER).write_text(json.dumps(facts))
    return path


def evaluation(run: Path, path: Path, seconds: int, count: int = 100, **figures: Any) -> None:
    """What `ditmoe evaluate` leaves of a checkpoint."""
    info = read_info(path)
    shared = {"which": "ema", "sampler": {"steps": 5}, "count": count, "labels": "balanced"}
    result = {"network": {"name": "classifier", "fingerprint": "n"}, "real": {"fingerprint": "r"}, **figures}
    content = {
        "evaluation": {"weights": f"{info.fingerprint}-ema", "step": info.step, **shared},
        "results": {"classifier": result},
    }
    file = run / "evaluations" / f"{info.step}-{count}" / "metrics.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))
    os.utime(file, (seconds, seconds))


def test_mean_loss_of_the_last_steps(tmp_path: Path) -> None:
    file = tmp_path / "stats.jsonl"
    assert losses(file, [4], 4) == {}
    records = [{"step": step, "loss": loss} for step, loss in ((2, 4.0), (4, 2.0), (6, None), (8, 1.0), (10, 9.0))]
    damaged = 'nonsense\n{"step": "x", "loss": 1}\n[]\n\x00\n'
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + damaged + '{"step": 12, "lo')
    assert losses(file, [4, 8, 10, 14], 4) == {4: 3.0, 8: 1.0, 10: 5.0}


def test_only_comparable_evaluations_count(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path, step) for step in (10, 20, 30)]
    assert evaluated(tmp_path / "evaluations", "fid", paths) == {}
    evaluation(tmp_path, paths[0], 100, fid=5.0, recall=0.5)
    evaluation(tmp_path, paths[1], 101, fid=4.0, recall=0.25)
    assert evaluated(tmp_path / "evaluations", "fid", paths) == {10: 5.0, 20: 4.0}
    assert evaluated(tmp_path / "evaluations", "recall", paths) == {10: 0.5, 20: 0.25}
    # Fewer images, so a larger FID: while it is the latest, nothing is compared with it.
    evaluation(tmp_path, paths[2], 102, count=50, fid=9.0)
    assert evaluated(tmp_path / "evaluations", "fid", paths) == {30: 9.0}
    evaluation(tmp_path, paths[2], 103, fid=float("nan"))
    assert evaluated(tmp_path / "evaluations", "fid", paths) == {30: 9.0}
    # The same step, trained anew: its evaluation was of other weights.
    change_marker(paths[0], lambda facts: next(iter(facts["files"].values())).update(sha256="f" * 64))
    evaluation(tmp_path, paths[1], 104, count=200, fid=3.0)
    assert evaluated(tmp_path / "evaluations", "fid", paths) == {20: 3.0}
    assert evaluated(tmp_path / "evaluations", "sfid", paths) == {}
    (tmp_path / "evaluations" / "10-100" / "metrics.json").write_text("{")
    assert evaluated(tmp_path / "evaluations", "fid", paths) == {20: 3.0}


@pytest.mark.parametrize(("metric", "best"), [("fid", [20, 30]), ("recall", [30, 10])])
def test_lower_or_higher(tmp_path: Path, metric: str, best: list[int]) -> None:
    """Of equally good ones the later is the better."""
    paths = [checkpoint(tmp_path, step) for step in (10, 20, 30)]
    for path, fid, recall in zip(paths, (3.0, 1.0, 2.0), (0.5, 0.25, 0.5), strict=True):
        evaluation(tmp_path, path, 100, fid=fid, recall=recall)
    retention = CheckpointConfig.model_validate({"keep_best": 2, "best_metric": metric})
    assert BestCheckpoints(RunFolder(tmp_path), retention, 10)(paths) == best
    assert BestCheckpoints(RunFolder(tmp_path), CheckpointConfig(), 10)(paths) == []


def test_every_figure_that_checkpoints_are_kept_by_has_its_direction_and_is_shown() -> None:
    metrics = get_args(CheckpointConfig.model_fields["best_metric"].annotation)
    assert set(metrics) - set(LOWER_IS_BETTER) == {"precision", "recall", "inception_score"}
    figures = set(metrics) - {"loss"}
    assert figures == set(sweep_table.FIGURES) and figures <= set(watch_boards.FIGURES)
