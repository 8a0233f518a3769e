"""The script of an array: what it asks for, and that each element becomes the script of its cell."""

import os
import subprocess
from pathlib import Path

import pytest

from ditmoe.launcher.submission.request import job_request
from ditmoe.slurm.job_folder import training_folder
from ditmoe.slurm.submission.array import render_array
from ditmoe.slurm.submission.script import Request
from ditmoe.slurm.submission.settings import JobSettings


@pytest.fixture
def requests(tmp_path: Path) -> dict[int, Request]:
    settings = JobSettings(nodes=2, tasks_per_node=2, time="30", sbatch={"dependency": "afterok:7", "nice": 3})
    found = {}
    for number, name in ((0, "lr=1"), (2, "it's $HOME lr=2")):
        folder = training_folder(tmp_path / name)
        found[number] = job_request("train", ("train",), folder, settings, tmp_path / name)
    return found


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_what_an_array_asks_for(requests: dict[int, Request], tmp_path: Path) -> None:
    """Its elements do not wait for each other, as jobs of one name would by `singleton`."""
    found = options(render_array("ditmoe-x", tmp_path, requests))
    assert found[:3] == ["job-name=ditmoe-x", f"output={tmp_path}/output-%A_%a.txt", "array=0,2"]
    assert {"nodes=2", "ntasks-per-node=2", "time=30", "requeue", "open-mode=append", "nice=3"} <= set(found)
    assert not any("singleton" in line for line in found)
    names = [line.partition("=")[0] for line in found]
    assert len(set(names)) == len(names)
    after = options(render_array("ditmoe-x", tmp_path, requests, "aftercorr:5", 4))
    assert {"array=0,2%4", "dependency=aftercorr:5", "kill-on-invalid-dep=yes"} <= set(after)
    with pytest.raises(ValueError, match="no colon"):
        render_array("ditmoe-x", tmp_path / "a:b", requests)


def test_each_element_becomes_the_script_of_its_cell(requests: dict[int, Request], tmp_path: Path) -> None:
    """By SLURM_JOB_ID, which the last element shares with the array, the end of one cell would be that of all."""
    for number, request in requests.items():
        request.folder.path.mkdir(parents=True)
        request.folder.script.write_text(f"echo cell {number} as $$ of job $1\n")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/renamed\n')
    scontrol.chmod(0o755)
    script = render_array("ditmoe-x", tmp_path, requests)
    for number, request in requests.items():
        variables = {
            "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "9",
            "SLURM_ARRAY_JOB_ID": "9",
        }
        process = subprocess.Popen(
            ["bash", "-c", script],
            env={**os.environ, **variables, "SLURM_ARRAY_TASK_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.communicate(timeout=30)[0] == b"" and process.returncode == 0
        # In the place of the array's own script, so that signals reach it.
        assert (
            request.folder.output(f"9_{number}").read_text()
            == f"cell {number} as {process.pid} of job 9_{number}\n"
        )
        assert (tmp_path / "renamed").read_text() == f"update JobId=9_{number} JobName={request.job.name}\n"
