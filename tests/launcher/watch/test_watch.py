"""Following a run: each checkpoint once, its figures in TensorBoard once, the best kept, an end with the run."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ditmoe.launcher.configuration.run_config import load_config
from ditmoe.launcher.training.best import BestCheckpoints
from ditmoe.launcher.training.evaluations import stored_evaluations
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.launcher.watch.boards import written_points
from ditmoe.launcher.watch.records import WATCH_FILE, read_lines
from ditmoe.launcher.watch.watch import watch_run
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import checkpoint_path, checkpoints
from ditmoe.parallel.checkpoint.holds import letting_go
from ditmoe.parallel.checkpoint.removal import Removal
from ditmoe.parallel.config import CheckpointConfig
from ditmoe.sampling.evaluation.job import Job
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_run, prepare_job
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER
from ditmoe.sampling.metrics.networks import opening
from ditmoe.sampling.settings.config import SamplerConfig
from tests.markers import change_marker
from tests.sampling.evaluation.test_evaluate_file import Pixels
from tests.sampling.small_run import write_checkpoint, write_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "shards")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


class Run:
    """A run of 40 steps with a checkpoint every 10."""

    def __init__(self, path: Path, digits: Path, cache: Path) -> None:
        self.path, self._digits, self._cache = path, digits, cache
        self.lines: list[str] = []
        self.evaluated: list[int] = []
        path.mkdir()
        file = path.with_suffix(".yaml")
        sections = {
            "run": {"dir": str(path)},
            "model": {"depth": 1, "hidden": 16, "heads": 2, "patch": 4, "image_size": 8, "channels": 1},
            "data": {"sources": [{"path": str(digits)}]},
            "train": {"steps": 40, "batch": 4, "checkpoint_every": 10},
        }
        file.write_text(yaml.safe_dump(sections))
        RunFolder(path).store_config(load_config(file, []))

    def save(self, step: int) -> Path:
        """A checkpoint as training would leave it, with weights of its own."""
        path = write_checkpoint(self.path, step)
        change_marker(path, lambda facts: facts.update(images=4 * step))
        return path

    def prepare(self, checkpoint: Path) -> Job:
        options = EvaluationOptions(
            source=checkpoint,
            sampler=SamplerConfig(steps=1),
            count=8,
            batch=8,
            labels="balanced",
            data=self._digits,
            recogniser=False,
            cache=self._cache,
        )
        return replace(prepare_job(options), feature_classifier=replace(FEATURE_CLASSIFIER, passes=1))

    def evaluate(self, job: Job) -> int:
        self.evaluated.append(job.evaluation.step)
        evaluate_run(job)
        return 0

    def watch(self, evaluate: Callable[[Job], int] | None = None, every: int = 1, patience: float = 0.0) -> int:
        self.lines, self.evaluated = [], []
        return watch_run(
            self.path,
            self.prepare,
            evaluate or self.evaluate,
            self.lines.append,
            every=every,
            patience=patience,
            poll=0.01,
        )

    @property
    def records(self) -> list[tuple[int, str]]:
        return [(line["step"], line["outcome"]) for line in read_lines(self.path / "evaluations" / WATCH_FILE)]

    @property
    def board(self) -> Path:
        (folder,) = (self.path / "tensorboard").iterdir()
        return folder

    def judge(self, figures: dict[int, float]) -> None:
        """Give stored evaluations other figures."""
        for one in [*stored_evaluations(self.path / "evaluations")]:
            file = self.path / "evaluations" / one.id / "metrics.json"
            content = json.loads(file.read_text())
            content["results"]["classifier"]["fid"] = figures[one.step]
            file.write_text(json.dumps(content))


@pytest.fixture
def run(tmp_path: Path, digits: Path, cache: Path) -> Run:
    return Run(tmp_path / "run", digits, cache)


def retention(run: Path, **settings: object) -> list[int]:
    """The steps that the run would keep for being good."""
    config = CheckpointConfig.model_validate(settings)
    return BestCheckpoints(RunFolder(run), config, 10)(checkpoints(run))


def test_each_checkpoint_is_scored_once_and_written_once(run: Run) -> None:
    """Also those that come meanwhile; started again, it does nothing more."""

    def evaluate(job: Job) -> int:
        if job.evaluation.step == 10:
            run.save(20)
            run.save(40)  # the last, so that the run is complete
        return run.evaluate(job)

    run.save(10)
    assert run.watch(evaluate) == 0
    assert run.evaluated == [10, 20, 40]
    assert "the run is complete: step 40; 3 of its checkpoints are scored" in run.lines
    table = [line for line in run.lines if line.split()[0] in ("step", "10", "20", "40")]
    assert [line.split()[:2] for line in table] == [["step", "images"], ["10", "40"], ["20", "80"], ["40", "160"]]
    # Step 30 was never there to be scored.
    assert sorted(run.records) == [(10, "scored"), (20, "scored"), (30, "removed"), (40, "scored")]
    points = written_points(run.board)
    names = ("FID", "KID", "precision", "recall", "images")
    scored = {(f"evaluation/{name}", step) for name in names for step in (10, 20, 40)}
    assert points == scored
    board = EventAccumulator(str(run.board))
    board.Reload()
    figures = {one.step: one.figure("fid") for one in stored_evaluations(run.path / "evaluations")}
    assert {event.step: event.value for event in board.Scalars("evaluation/FID")} == pytest.approx(figures)
    (picture,) = (run.path / "evaluations").glob("watch-*.png")
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 300

    before = {file: file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()}
    assert run.watch() == 0
    assert run.evaluated == []
    board.Reload()
    assert len(board.Scalars("evaluation/FID")) == 3
    after = {file: file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()}
    assert after.keys() == before.keys()
    assert after[run.path / "evaluations" / WATCH_FILE] == before[run.path / "evaluations" / WATCH_FILE]


def test_what_a_kill_left_out_of_the_records_is_written_at_the_next_start(run: Run) -> None:
    """Even where the checkpoint has been removed since."""
    run.save(10)
    evaluate_run(run.prepare(checkpoint_path(run.path, 10)))
    shutil.rmtree(checkpoint_path(run.path, 10))
    run.save(40)
    assert run.watch() == 0 and run.evaluated == [40]
    assert {step for tag, step in written_points(run.board)} == {10, 40}
    assert [step for step, outcome in run.records if outcome == "scored"] == [10, 40]


def test_the_best_is_marked_and_kept(run: Run) -> None:
    """Whatever the run's settings are; a mark of weights that were trained anew since keeps nothing."""
    for step in (10, 20, 40):
        run.save(step)
    assert retention(run.path) == []
    assert run.watch() == 0
    run.judge({10: 3.0, 20: 1.0, 40: 2.0})
    assert run.watch() == 0
    assert retention(run.path) == [20]
    assert retention(run.path, keep_best=2, best_metric="fid") == [20, 40]
    run.judge({10: 3.0, 20: 9.0, 40: 2.0})
    assert run.watch() == 0 and run.lines[3].endswith("best")  # under the heading, of step 40
    assert retention(run.path) == [40]
    change_marker(
        checkpoint_path(run.path, 40), lambda facts: next(iter(facts["files"].values())).update(sha256="f" * 64)
    )
    assert retention(run.path) == []


def test_a_checkpoint_is_held_from_its_scoring_until_the_best_is_marked(run: Run) -> None:
    run.save(40)
    free: list[bool] = []

    def evaluate(job: Job) -> int:
        assert job.checkpoint is not None
        with letting_go(job.checkpoint) as may_go:
            free.append(may_go)
        return run.evaluate(job)

    assert run.watch(evaluate) == 0
    with letting_go(checkpoint_path(run.path, 40)) as may_go:
        free.append(may_go)
    assert free == [False, True] and retention(run.path) == [40]


def test_what_retention_removes_before_its_turn_is_passed_over_with_a_word(run: Run) -> None:
    for step in (10, 20, 30, 40):
        run.save(step)

    def evaluate(job: Job) -> int:
        removal = Removal(run.path)
        for step in {10: (20, 30)}.get(job.evaluation.step, ()):
            removal.set_aside(checkpoint_path(run.path, step))
        return run.evaluate(job)

    assert run.watch(evaluate) == 0 and run.evaluated == [10, 40]
    (word,) = [line for line in run.lines if line.startswith("passed over")]
    assert "2 steps, 20 to 30: the run let the checkpoint go before it was scored" in word
    assert run.watch() == 0 and not [line for line in run.lines if line.startswith("passed over")]


def test_a_damaged_checkpoint_ends_nothing(run: Run) -> None:
    run.save(10)
    file = next(checkpoint_path(run.path, 10).glob("ema/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    run.save(40)
    assert run.watch() == 0 and run.evaluated == [40]
    assert (10, "damaged") in run.records
    assert any(line.startswith("passed over step 10: ") and str(file) in line for line in run.lines)


def test_every_second_checkpoint_and_the_last(run: Run) -> None:
    for step in (10, 20, 25, 30, 40):
        run.save(step)
    assert run.watch(every=2) == 0 and run.evaluated == [20, 40]
    assert run.watch(every=3) == 0 and run.evaluated == [30]
    assert run.watch() == 0 and run.evaluated == [10, 25]


def test_an_evaluation_that_fails_does_not_end_the_others(run: Run) -> None:
    """The exit code tells; the next start tries it again."""
    run.save(10)
    run.save(40)
    assert run.watch(lambda job: 1 if job.evaluation.step == 10 else run.evaluate(job)) == 1
    assert (10, "failed") in run.records and run.evaluated == [40]
    assert run.lines[-1] == "could not be scored: step 10"
    assert run.watch(lambda job: 2) == 2  # a user's mistake
    assert run.watch() == 0 and run.evaluated == [10]


def test_a_signal_ends_it_where_it_is(run: Run) -> None:
    run.save(10)
    run.save(40)
    assert run.watch(lambda job: 128 + 15) == 128 + 15
    assert run.lines[-1] == "stopped by SIGTERM; repeat the command to continue"
    assert run.records == []
    assert run.watch() == 0 and run.evaluated == [10, 40]


def test_a_run_that_shows_no_sign_is_given_up_after_a_while(run: Run) -> None:
    """One that has stopped is waited for until then."""
    run.save(10)
    (run.path / "state.json").write_text(json.dumps({"state": "stopped", "step": 10}))
    with pytest.raises(UserError, match=r"no sign of training for .*step 10 of 40 is the newest checkpoint's"):
        run.watch(patience=0.2)
    assert run.evaluated == [10]
    assert any(line.startswith("waiting for the next checkpoint (stopped; step 10 of 40") for line in run.lines)


def test_the_last_word_of_the_run_ends_it(run: Run) -> None:
    """Though its last checkpoint has been taken away."""
    run.save(30)
    (run.path / "state.json").write_text(json.dumps({"state": "complete", "step": 40, "steps": 40}))
    assert run.watch() == 0 and run.evaluated == [30]


def test_a_place_that_is_no_run(run: Run) -> None:
    for path in (run.path / "nowhere", run.save(10)):
        with pytest.raises(UserError, match="expected the folder of a run"):
            watch_run(path, run.prepare, run.evaluate, print)


def test_the_grid_has_the_first_images(run: Run) -> None:
    run.save(40)
    assert run.watch() == 0
    board = EventAccumulator(str(run.board), size_guidance={"images": 0})
    board.Reload()
    (event,) = board.Images("evaluation/images")
    (samples,) = (run.path / "evaluations").glob("*/samples.npz")
    with np.load(samples) as stored:
        first = stored["arr_0"][0]
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert picture.shape == (event.height, event.width, 3)
    assert np.array_equal(picture[2 : 2 + 64 : 8, 2 : 2 + 64 : 8], first)  # enlarged eight times, beside a gap


def test_checkpoints_are_compared_with_statistics_of_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments alone give neither floor nor precision; the best is marked all the same."""
    monkeypatch.setattr(opening, "load_inception", lambda path, device, resize: Pixels())
    file, weights = run.path.with_suffix(".npz"), run.path.with_suffix(".pth")
    np.savez(file, mu=np.full(16, 0.4), sigma=0.1 * np.eye(16))
    weights.write_bytes(b"weights")
    prepare = run.prepare

    def with_statistics(checkpoint: Path) -> Job:
        options = EvaluationOptions(
            source=checkpoint,
            sampler=SamplerConfig(steps=1),
            count=24,
            batch=8,
            data=file,
            features="inception",
            features_path=weights,
            cache=prepare(checkpoint).cache,
        )
        return prepare_job(options)

    monkeypatch.setattr(run, "prepare", with_statistics)
    run.save(20)
    run.save(40)
    assert run.watch() == 0 and run.evaluated == [20, 40]
    table = [line.split() for line in run.lines if line.split()[0] in ("20", "40")]
    assert [line[3:] for line in table if line[-1] != "best"] == [["–"] * 5] and len(table) == 2
    assert any(line[-1] == "best" for line in table)
    (mark,) = (run.path / "evaluations").glob("best-*-inception-*.json")
    figures = [one.figure("fid") or 0 for one in stored_evaluations(run.path / "evaluations")]
    assert json.loads(mark.read_text())["figure"] == min(figures) > 0
