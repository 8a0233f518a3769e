"""A run's folder: one writer at a time, and a configuration that does not change under a run."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ditmoe.data.stream.remembered import kept_in_checkpoint
from ditmoe.launcher.configuration.run_config import RunConfig, load_config
from ditmoe.launcher.training.kept_sums import kept_sums
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import checkpoint_path, read_info
from ditmoe.parallel.checkpoint.marker import MARKER, marker_text
from tests.markers import change_marker

Write = Callable[..., Path]


def test_the_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        with pytest.raises(UserError) as caught, RunFolder(tmp_path / "run").lock():
            pass
        message = str(caught.value)
        assert str(tmp_path / "run") in message
        assert f"process {os.getpid()} on {socket.gethostname()}" in message
    with folder.lock():
        pass


def test_a_forked_worker_does_not_hold_the_lock(tmp_path: Path) -> None:
    """A data worker may outlive a killed run for seconds, and the run must be repeatable at once."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def wait() -> None:
        ready.set()
        done.wait(20)

    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        worker = context.Process(target=wait)
        worker.start()
        assert ready.wait(10)
    with RunFolder(tmp_path / "run").lock():
        done.set()
    worker.join(10)
    assert worker.exitcode == 0


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made the run folder"), RunFolder(tmp_path / "file").lock():
        pass


@pytest.fixture
def stored(write_config: Write, tmp_path: Path) -> Callable[..., list[str]]:
    """Stores the configuration with overrides in the same folder, which has a checkpoint; what changed."""

    def store(*overrides: str) -> list[str]:
        checkpoint = tmp_path / "run" / "checkpoints" / "step-00000007"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / MARKER).touch()
        config, folder = load_config(write_config(), list(overrides)), RunFolder(tmp_path / "run")
        changes = folder.compare_config(config)
        folder.store_config(config, changes, step=7)
        values, _ = _read(tmp_path / "run" / "config.yaml")
        assert RunConfig.model_validate(values) == config
        return [f"{key}: {before} before, {now} now" for key, before, now in changes]

    return store


def _read(path: Path) -> tuple[dict[str, object], list[str]]:
    from ditmoe.model.outside.yaml_reader import read_yaml

    return read_yaml(path)


SOURCES = 'data.sources=[{path: "https://user:%s@host/shards?token=%s"}]'


def test_secrets_of_sources_are_kept_for_the_owner_and_shown_to_nobody(
    stored: Callable[..., list[str]], tmp_path: Path
) -> None:
    stored("data.sources=[{path: shards}]")
    file = tmp_path / "run" / "config.yaml"
    assert file.stat().st_mode & 0o077, "without secrets, others may read it"
    stored(SOURCES % ("secret", "secret"))
    assert "secret" in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    stored(SOURCES % ("another", "another"))
    history = (tmp_path / "run" / "history.jsonl").read_text()
    assert history.count("data.sources") == 2 and "secret" not in history and "another" not in history


def test_the_same_configuration_is_taken_again(stored: Callable[..., list[str]]) -> None:
    assert stored() == [] and stored() == []


def test_harmless_changes_are_taken_and_told(stored: Callable[..., list[str]]) -> None:
    stored()
    changes = stored("train.steps=40", "parallel.zero=2", "checkpoint.keep_last=5", "data.workers=0")
    assert changes == [
        "data.workers: 1 before, 0 now",
        "parallel.zero: 1 before, 2 now",
        "train.steps: 20 before, 40 now",
        "checkpoint.keep_last: 2 before, 5 now",
    ]
    assert stored("train.steps=40", "parallel.zero=2", "checkpoint.keep_last=5", "data.workers=0") == []


def test_changes_of_the_curve_that_may_be_are_kept_in_the_history(
    stored: Callable[..., list[str]], tmp_path: Path
) -> None:
    stored()
    overrides = ["optim.lr=0.5", "optim.clip=1", "model.label_dropout=0.2", "train.skip_steps=[9]", "ema.decay=0"]
    assert len(stored(*overrides)) == len(overrides)
    assert stored(*overrides) == []
    stored()
    entries = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [(entry["key"], entry["before"], entry["now"]) for entry in entries] == [
        ("model.label_dropout", 0.1, 0.2),
        ("train.skip_steps", [], [9]),
        ("optim.lr", 1e-4, 0.5),
        ("optim.clip", None, 1.0),
        ("ema.decay", 0.9999, 0.0),
        ("model.label_dropout", 0.2, 0.1),
        ("train.skip_steps", [9], []),
        ("optim.lr", 0.5, 1e-4),
        ("optim.clip", 1.0, None),
        ("ema.decay", 0.0, 0.9999),
    ]
    assert {entry["step"] for entry in entries} == {7} and all(entry["time"] for entry in entries)


def test_anything_may_change_while_nothing_was_trained(write_config: Write, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.store_config(load_config(write_config(), []))
    (folder.checkpoints / "step-00000003.partial").mkdir(parents=True)
    changes = folder.compare_config(load_config(write_config(), ["seed=1", "model.depth=3", "optim.lr=1"]))
    assert [change.key for change in changes] == ["model.depth", "optim.lr", "seed"]


def test_changes_of_the_curve_are_refused_together(
    stored: Callable[..., list[str]], tmp_path: Path, write_config: Write
) -> None:
    stored()
    before = (tmp_path / "run" / "config.yaml").read_text()
    overrides = ["seed=1", "train.batch=32", "objective.kind=ddpm", "model.depth=3", "train.steps=9"]
    with pytest.raises(UserError) as caught:
        stored(*overrides)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'run'} cannot be resumed: 4 problems",
        "  model.depth = 3, but the run was started with 2; expected the same, or another run.dir",
        "  objective.kind = 'ddpm', but the run was started with 'rectified_flow';"
        " expected the same, or another run.dir",
        "  train.batch = 32, but the run was started with 16; expected the same, or another run.dir",
        "  seed = 1, but the run was started with 0; expected the same, or another run.dir",
    ]
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_check_writes_nothing_and_finds_both(write_config: Write, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    config, other = load_config(write_config(), []), load_config(write_config(), ["seed=1"])
    folder.check(config)
    assert not folder.path.exists()
    folder.path.mkdir()
    folder.store_config(config)
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    (folder.checkpoints / "step-00000001" / MARKER).touch()
    folder.check(config)
    with pytest.raises(UserError, match="seed = 1, but the run was started with 0"):
        folder.check(other)
    with folder.lock(), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        RunFolder(folder.path).check(config)


def test_a_damaged_stored_configuration(write_config: Write, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: 3\n")
    with pytest.raises(UserError, match=r"config\.yaml: not the configuration of a run"):
        RunFolder(tmp_path).compare_config(load_config(write_config(), []))


def write_checkpoint(run: Path, config: RunConfig, step: int, **changes: object) -> Path:
    """A checkpoint of which only the marker is there, as a run of this configuration writes it."""
    path = checkpoint_path(run, step)
    path.mkdir(parents=True)
    facts = {
        "format": 2,
        "step": step,
        "images": 0,
        "sums": {},
        "parts": ["weights", "ema", "exp_avg", "exp_avg_sq"],
        "config": kept_in_checkpoint(config.plain()),
        "dataset": {},
        "layout": {"pipe": 1, "data": 2, "expert": 2, "tensor": 1, "zero": 1},
        "shapes": {f"p{number}": [1] for number in range(8)},
        **changes,
    }
    files = {f"{part}/shard-00001.safetensors": {"bytes": 32, "sha256": "0" * 64} for part in facts["parts"]}  # type: ignore[attr-defined]
    (path / MARKER).write_text(marker_text({**facts, "files": files}))
    return path


@pytest.fixture
def config(write_config: Write) -> Callable[..., RunConfig]:
    sizes = ["model.image_size=8", "model.channels=1", "model.num_classes=10"]
    return lambda *overrides: load_config(write_config(), [*sizes, *overrides])


def test_without_config_yaml_the_newest_checkpoint_is_compared(
    tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    run, folder = tmp_path / "run", RunFolder(tmp_path / "run")
    write_checkpoint(run, config("seed=7"), 4)
    write_checkpoint(run, config("seed=3"), 8)
    unreadable = write_checkpoint(run, config("seed=7"), 9)
    (unreadable / MARKER).write_text("{")
    folder.check(config("seed=3", "train.steps=99"))
    with pytest.raises(UserError) as caught:
        folder.check(config("seed=1", "model.depth=3"))
    assert [line.partition(",")[0].strip() for line in str(caught.value).splitlines()] == [
        f"{run} cannot be resumed: 2 problems",
        "model.depth = 3",
        "seed = 1",
    ]
    assert not folder.config.exists()
    (change,) = (each for each in folder.compare_config(config("seed=3", "train.steps=99")) if "steps" in each.key)
    assert (change.before, change.now) == (20, 99)


@pytest.mark.parametrize("stored", [False, True])
def test_weights_without_an_optimiser_in_a_run_folder(
    tmp_path: Path, config: Callable[..., RunConfig], stored: bool
) -> None:
    """Converted weights: neither ignored nor a traceback; a checkpoint of training beside them is taken."""
    run, folder = tmp_path / "run", RunFolder(tmp_path / "run")
    facts = {"parts": ["weights", "ema"], "layout": None}
    write_checkpoint(run, config(), 0, **facts)
    if stored:
        folder.store_config(config())
    message = (
        r"step-00000000: holds weights and ema without exp_avg and exp_avg_sq.*`ditmoe sample`.*another run\.dir"
    )
    with pytest.raises(UserError, match=message):
        folder.check(config())
    write_checkpoint(run, config(), 8)
    folder.check(config())

    (checkpoint_path(run, 0) / MARKER).rename(tmp_path / MARKER)
    with pytest.raises(UserError, match=rf"{tmp_path}: holds weights and ema without"):
        RunFolder(tmp_path).check(config())


@pytest.mark.parametrize(
    ("sums", "problem"),
    [
        ({"steps": -1}, "steps = -1"),
        ({"loss": "much"}, "loss = 'much'"),
        ({"loss": float("inf")}, "loss = inf"),
        ({"skips": {"a": 3}}, "skips.a = 3"),
        ({"skips": {"a": {"total": 1, "by_epoch": {"x": 1}}}}, "skips.a.by_epoch.x"),
        ({"skips": {"a": {"total": 1, "by_epoch": {}}}}, "skips.a.by_epoch"),
        ({"other": 1}, "other = 1"),
        ({"expert_load": [[0.5] * 4]}, "expert_load is not of 2 blocks of 4 experts"),
    ],
)
def test_sums_that_no_run_keeps(
    tmp_path: Path, config: Callable[..., RunConfig], sums: dict[str, object], problem: str
) -> None:
    good = {
        "steps": 2,
        "loss": 1,
        "expert_load": [[0.25] * 4] * 2,
        "skips": {"a": {"total": 1, "by_epoch": {"0": 1}}},
    }
    path = write_checkpoint(tmp_path, config(), 4, sums=good)
    assert kept_sums(read_info(path)) == good
    change_marker(path, lambda facts: facts["sums"].update(sums))
    with pytest.raises(UserError, match=f"checkpoint.json: sums cannot be read \\({problem}"):
        kept_sums(read_info(path))


@pytest.mark.timeout(30)
def test_a_pipe_in_place_of_the_configuration_is_a_message_and_no_wait(
    write_config: Write, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    os.mkfifo(folder.config)
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read: not a regular file"):
        folder.check(load_config(write_config(), []))
