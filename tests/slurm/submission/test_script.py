"""The batch script: as the golden files have it, and whatever a user gives is a word of it and nothing else."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ditmoe.slurm.job_folder import PHASES
from ditmoe.slurm.submission.script import render
from ditmoe.slurm.submission.settings import JobSettings, contradictions
from ditmoe.slurm.submission.values import (
    OWNED,
    duration_seconds,
    in_option,
    one_line,
    raw_option,
    time_limit_seconds,
)
from tests.slurm.submission.golden import CASES, FOLDER, path_of, request


@pytest.mark.parametrize("name", CASES)
def test_scripts_are_the_golden_ones(name: str) -> None:
    assert render(CASES[name]) == path_of(name).read_text(encoding="utf-8"), (
        "run: python -m tests.slurm.submission.golden"
    )


def test_every_golden_file_has_its_case() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_bash_takes_the_scripts(name: str) -> None:
    done = subprocess.run(["bash", "-n", path_of(name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def read_back(line: str) -> str:
    """The value of `--key=value` as Slurm reads a batch script: quotes, and backslashes everywhere."""
    value, quote, escaped = "", "", False
    for character in line.partition("=")[2]:
        if escaped:
            value, escaped = value + character, False
        elif character == "\\":
            escaped = True
        elif character == quote:
            quote = ""
        elif not quote and character in "'\"":
            quote = character
        else:
            assert quote or not character.isspace(), line
            value += character
    assert not quote and not escaped, line
    return value


LINES = st.text(min_size=1, max_size=80).filter(lambda text: not _refused(text))


def _refused(text: str) -> bool:
    try:
        one_line(text)
    except ValueError:
        return True
    return False


@given(LINES)
def test_slurm_reads_a_value_back(value: str) -> None:
    assert read_back(f"comment={in_option(value)}") == value


FOLDER_NAMES = st.text(min_size=1, max_size=40).filter(
    lambda name: not _refused(name) and not set(name) & set("/\\:") and name.strip(".") != ""
)


@settings(max_examples=25, deadline=None)
@given(FOLDER_NAMES, LINES, LINES)
def test_no_value_gets_out_of_its_place(folder: str, comment: str, variable: str) -> None:
    """The shell finds each word again, and the script has as many lines as with plain values."""
    made = render(request(run=f"/r/{folder}", sbatch={"comment": comment}, environment={"V": variable}))
    plain = render(request(run="/r/x", sbatch={"comment": "x"}, environment={"V": "x"}))
    assert made.count("\n") == plain.count("\n")
    assert [line for line in made.splitlines() if line.startswith("#SBATCH --comment=")] == [
        f"#SBATCH --comment={in_option(comment)}"
    ]
    start, end = made.index("export V="), made.index("attempts=")
    program = made[start:end] + 'printf \'%s\\0\' "$V" "$job_folder"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:2] == [variable, f"/r/{folder}/slurm/train"]
    assert subprocess.run(["bash", "-n"], input=made.encode(), capture_output=True).stderr == b""


@pytest.mark.parametrize("name", ["a\\b", "a:b", "a\nb", "a\x1bb", "x" * 3000])
def test_folders_that_slurm_would_misread_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in a batch script"):
        render(request(run=f"/r/{name}"))


@pytest.mark.parametrize(
    "key", [*OWNED, "sig", "outp", "n", "", "-x", "a b", "a=b", "a\nb", "Mail-Type", "--time"]
)
def test_options_that_are_not_the_users_to_give(key: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        raw_option(key)
    with pytest.raises(ValidationError):
        JobSettings.model_validate({"sbatch": {key: "x"}})


@pytest.mark.parametrize(
    "key", ["mail-type", "exclusive", "gpus", "reservation", "nodelist", "dependency", "hold"]
)
def test_other_options_are_taken(key: str) -> None:
    assert raw_option(key) == key


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("60", 3600),
        ("1:30", 90),
        ("12:00:00", 43200),
        ("2-00", 172800),
        ("2-12:30", 217800),
        ("1-0:0:1", 86401),
        ("UNLIMITED", None),
    ],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    assert time_limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["0", "x", "", "1h", "-1", "1-", "1:2:3:4", "1.5", "0-0:0:0", "٣", "1\n"])
def test_what_is_no_time_limit(text: str) -> None:
    with pytest.raises(ValueError, match="expected a time"):
        time_limit_seconds(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400)]
)
def test_durations(text: str, seconds: int) -> None:
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "h", "1d", "-5", "1.5h", "9" * 30, "30m1h", "٣"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        duration_seconds(text)


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ({}, 300),
        ({"time": "4"}, 60),
        ({"time": "1-00"}, 300),
        ({"time": "4", "warning": 9}, 9),
        ({"time": "0:01"}, 1),
    ],
)
def test_the_warning_comes_well_before_the_end(values: dict[str, Any], seconds: int) -> None:
    assert JobSettings.model_validate(values).warning_seconds == seconds
    assert f"#SBATCH --signal=B:USR2@{seconds}\n" in render(request(**values))


def test_settings_that_contradict_each_other() -> None:
    late = contradictions(JobSettings(time="1", warning=60))
    assert late == [
        "--warning 60 with --time 1: the warning would come before the start; expected less than the 60 s of the"
        " time limit"
    ]
    (tasks,) = contradictions(JobSettings(gpus_per_node=4, tasks_per_node=8))
    assert "--tasks-per-node 8 with --gpus-per-node 4" in tasks
    assert contradictions(JobSettings(gpus_per_node=4, tasks_per_node=1, time="60", warning=60)) == []


def test_tasks_follow_the_gpus() -> None:
    assert [JobSettings(gpus_per_node=gpus).tasks for gpus in (0, 1, 8)] == [1, 1, 8]
    assert JobSettings(gpus_per_node=8, tasks_per_node=2).tasks == 2


def test_limits_have_defaults() -> None:
    assert JobSettings().limit_seconds == PHASES
    assert JobSettings(limits={"save": "2h"}).limit_seconds == {**PHASES, "save": 7200}


@pytest.mark.parametrize(
    ("runtime", "start", "step"),
    [
        (
            "apptainer",
            "apptainer exec --nv --bind=/home/ann --bind=/runs/tiny --bind=/data:/d:ro"
            " --pwd=/home/ann /x.sif python3",
            "--cpus-per-task=4",
        ),
        (
            "pyxis",
            "python3",
            "--cpus-per-task=4 --container-image=/x.sif"
            " --container-mounts=/home/ann:/home/ann,/runs/tiny:/runs/tiny,/data:/d:ro"
            " --container-workdir=/home/ann",
        ),
    ],
)
def test_containers(runtime: str, start: str, step: str) -> None:
    job = request(
        container="/x.sif",
        container_runtime=runtime,
        container_mounts=["/data:/d:ro"],
        gpus_per_node=1,
        cpus_per_task=4,
    ).job
    assert (" ".join(job.task), " ".join(job.srun)) == (start, step)
    assert job.python == "/opt/ditmoe/bin/python"  # the supervisor needs Slurm's programs, which no image has


def test_without_a_container_tasks_are_this_python() -> None:
    job = request().job
    assert (job.task, job.srun) == (("/opt/ditmoe/bin/python",), ())


def test_gpus_are_asked_for_as_the_cluster_takes_them() -> None:
    def asked(**values: Any) -> list[str]:
        return re.findall(r"^#SBATCH --(g\S+)$", render(request(gpus_per_node=8, **values)), re.MULTILINE)

    assert asked() == ["gpus-per-node=8"]
    assert asked(gpu_type="a100") == ["gpus-per-node=a100:8"]
    assert asked(gpu_type="a100", gpu_request="gres") == ["gres=gpu:a100:8"]
    assert asked(gpu_request="none") == []


def test_the_template_is_package_data() -> None:
    from ditmoe.slurm.submission.script import TEMPLATE

    assert TEMPLATE.is_file() and TEMPLATE.parent == Path(__file__).resolve().parents[3] / "slurm" / "templates"
