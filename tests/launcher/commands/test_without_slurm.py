"""What talks to Slurm, where there is none of it or its controller is away: one message, and exit code 2."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ditmoe.slurm.attempts import record_submission
from ditmoe.slurm.job_folder import training_folder, workers_folder
from tests.forked import DITMOE, run_forked
from tests.launcher.commands.test_jobs import make_run

PROGRAMS = ("sbatch", "squeue", "scontrol", "sacct", "scancel", "sinfo")
SAYS = {
    "no programs": None,
    "no slurm.conf": "{0}: error: fetch_config: DNS SRV lookup failed\n"
    "{0}: error: _establish_config_source: failed to fetch config\n"
    "{0}: fatal: Could not establish a configuration source",
    "no controller": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
    "another failure": "{0}: error: Invalid credential",
}
"""Machine → what each of Slurm's programs says there; None: there is no program."""
TOLD = {
    "no programs": "squeue is not on the PATH; expected a machine of a Slurm cluster that submits jobs",
    "no slurm.conf": "squeue finds no configuration of Slurm (slurm.conf); expected a machine of a Slurm cluster",
    "no controller": "squeue gets no answer from Slurm: Unable to contact slurm controller (connect failure);"
    " expected a controller that answers: `scontrol ping`",
    "another failure": "squeue: Invalid credential",
}


@pytest.fixture(params=SAYS)
def machine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A PATH with bash, and with programs of Slurm that fail in one way or are not there."""
    programs = tmp_path / "programs"
    programs.mkdir()
    bash = shutil.which("bash")
    assert bash is not None
    (programs / "bash").symlink_to(bash)
    says = SAYS[request.param]
    for name in PROGRAMS if says is not None else ():
        assert says is not None
        (programs / name).write_text(f"#!{bash}\necho '{says.format(name)}' >&2\nexit 1\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    return str(request.param)


@pytest.fixture
def made(tmp_path: Path, shards: Path, write_config: Callable[..., Path]) -> Path:
    """A folder with a configuration, a run that a job was submitted for, and a crew of which the same holds."""
    (shards / "tiny-000000.tar").write_bytes(bytes(1000))
    write_config(run={"dir": "runs/new"})
    run = make_run(tmp_path / "run", "training")
    crew = tmp_path / "crew"
    for folder in (training_folder(run).path, workers_folder(crew, 1).path):
        folder.mkdir(parents=True)
        record_submission(folder, "7", 1.0)
    return tmp_path


SUBMITS = (
    ["submit", "train", "tiny.yaml"],
    ["submit", "sweep", "tiny.yaml", "optim.lr=1e-4,2e-4"],
    ["submit", "evaluate", "run", "--watch"],
    ["submit", "workers", "others"],
)
CANCELS = (["cancel", "run"], ["cancel", "crew"])


def test_each_order_is_one_message(machine: str, made: Path, tmp_path: Path) -> None:
    for arguments in (*SUBMITS, *CANCELS):
        done = run_forked([*DITMOE, *arguments], tmp_path / "out")
        assert done.returncode == 2 and done.stdout == "", (arguments, done)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (arguments, done.stderr)
        assert TOLD[machine] in done.stderr and "Traceback" not in done.stderr, (arguments, done.stderr)
        end = "Nothing was cancelled" if arguments[0] == "cancel" else "--dry-run shows the batch script"
        assert end in done.stderr, (arguments, done.stderr)
    assert not (made / "runs").exists() and not list(made.rglob("submit.sbatch"))
    assert not [line for path in made.rglob("attempts.jsonl") for line in path.read_text().splitlines()[1:]]


def test_each_submission_can_be_looked_at(machine: str, made: Path, tmp_path: Path) -> None:
    for arguments in SUBMITS:
        done = run_forked([*DITMOE, *arguments, "--dry-run"], tmp_path / "out")
        assert done.returncode == 0 and done.stdout.startswith("#!/"), (arguments, done)
        assert "#SBATCH --job-name=" in done.stdout, (arguments, done.stdout)


def test_what_a_folder_says_is_shown_with_what_is_missing(machine: str, made: Path, tmp_path: Path) -> None:
    reason = TOLD[machine].partition("; expected")[0]
    for place, reported in (("run", "run: training"), ("crew", "crew: nobody leads it\n  workers-1   unknown")):
        done = run_forked([*DITMOE, "status", place], tmp_path / "out")
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(reported), done
        assert reason in done.stdout, done.stdout
    shown = run_forked([*DITMOE, "logs", "run", "-n", "1"], tmp_path / "out")
    assert (shown.returncode, shown.stdout) == (0, "line 99\n")


def test_bash_is_missing(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    done = run_forked([*DITMOE, "submit", "workers", "others", "--dry-run"], tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: bash cannot be run (No such file or directory)")
