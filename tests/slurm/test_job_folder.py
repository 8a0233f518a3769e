"""The files of a job: their places, names in the queue, and what job.json says."""

import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe.model.errors import UserError
from ditmoe.slurm.job_folder import (
    PHASES,
    Job,
    dataset_folder,
    evaluation_folder,
    job_folders,
    job_name,
    opened,
    read_job,
    training_folder,
)

JOB = Job(
    name="ditmoe-tiny-0123ab",
    verb="train",
    arguments=("train", "--", "/runs/tiny/slurm/train/config.yaml"),
    run="/runs/tiny",
    nodes=2,
    tasks_per_node=4,
    gpus_per_node=4,
    directory="/home/ann",
    python="/opt/python",
    task=("/opt/python",),
    srun=("--cpus-per-task=8",),
    limits=PHASES,
    warning=60,
)


def test_a_job_is_read_as_it_was_stored(tmp_path: Path) -> None:
    folder = training_folder(tmp_path / "run")
    folder.path.mkdir(parents=True)
    folder.store(JOB)
    assert read_job(folder) == JOB
    assert stat.S_IMODE(folder.job.stat().st_mode) == 0o600


def test_a_job_that_cannot_be_read(tmp_path: Path) -> None:
    folder = dataset_folder(tmp_path / "out")
    with pytest.raises(UserError, match=r"out\.slurm/job\.json: cannot be read: No such file"):
        read_job(folder)
    folder.path.mkdir()
    folder.store(JOB)
    whole = json.loads(folder.job.read_text())
    broken: list[tuple[str, Any]] = [("nodes", "two"), ("arguments", "train"), ("limits", {"step": "soon"})]
    for key, value in broken:
        folder.job.write_text(json.dumps({**whole, key: value}))
        with pytest.raises(UserError, match=rf"job\.json: {key}.* is damaged; repeat the `ditmoe submit`"):
            read_job(folder)
    for text in ("", "[]", '{"name": "x"'):
        folder.job.write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            read_job(folder)


def test_folders_are_found_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    training, evaluation = training_folder(run), evaluation_folder(run, ["run", "--count", "9"])
    assert training.script == run / "submit.sbatch" and evaluation.script == evaluation.path / "submit.sbatch"
    assert evaluation != evaluation_folder(run, ["run", "--count=9"])
    assert job_folders(run) == []
    for folder in (evaluation, training):
        assert opened(folder.path) == folder
        folder.path.mkdir(parents=True)
        folder.store(JOB)
    assert job_folders(run) == [training, evaluation]
    assert dataset_folder(run).path == tmp_path / "run.slurm"


@given(st.text(min_size=1, max_size=60).filter(lambda name: "/" not in name and "\0" not in name))
def test_names_in_the_queue_are_plain_words(name: str) -> None:
    assert re.fullmatch(
        r"ditmoe-([A-Za-z0-9_][A-Za-z0-9._-]*-)?[0-9a-f]{6}", job_name(training_folder(Path("/x", name)))
    )


def test_names_in_the_queue_tell_folders_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "a" / "run", tmp_path / "b" / "run"
    names = [job_name(training_folder(run)) for run in (here, there)]
    names += [job_name(evaluation_folder(run, ["run"])) for run in (here, there)]
    assert len(set(names)) == 4 and all(name.startswith("ditmoe-") for name in names)
    monkeypatch.chdir(tmp_path)
    assert job_name(training_folder(Path("a/run"))) == names[0]
    (tmp_path / "link").symlink_to(here)
    assert job_name(training_folder(Path("link"))) == names[0]
