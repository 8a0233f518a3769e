"""`ditmoe submit`: options and site file, the planner's checks, and that a dry run writes nothing."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from ditmoe.launcher.commands.data import encode, synthesize
from ditmoe.launcher.commands.evaluate import command as evaluate
from ditmoe.launcher.commands.submit.group import app
from ditmoe.launcher.commands.submit.options import _JOB_OPTIONS, _SETTINGS, Asked, asks_slurm
from ditmoe.launcher.commands.submit.other_jobs import (
    encoding_job,
    evaluation_job,
    following_evaluation,
    synthesis_job,
)
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.submission.asked import SITE_VARIABLE, job_settings
from ditmoe.launcher.submission.training import training_job
from ditmoe.launcher.submission.workers import workers_job
from ditmoe.model.errors import UserError
from ditmoe.slurm.attempts import record_submission
from ditmoe.slurm.submission.script import Request
from ditmoe.slurm.submission.settings import JobSettings

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(SITE_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Path]:
    """Writes a site file."""

    def write(**values: Any) -> Path:
        path = tmp_path / "site.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_every_option_is_a_setting() -> None:
    options = {_SETTINGS.get(name, name) for name in _JOB_OPTIONS} - {"site", "dry_run"}
    assert options <= set(JobSettings.model_fields)
    of_site_alone = set(JobSettings.model_fields) - options
    assert of_site_alone == {"gpu_type", "gpu_request", "container_python", "python", "environment", "preamble"}


def test_the_page_has_every_key_of_the_site_file() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "slurm.md").read_text(encoding="utf-8")
    table = page[page.index("## The site file") : page.index("## Containers")]
    missing = [name for name in JobSettings.model_fields if f"`{name}`" not in table]
    assert not missing, f"docs/slurm.md lacks {', '.join(missing)}"


@pytest.mark.parametrize("verb", [evaluate, encode.command, synthesize.command])
def test_no_option_of_the_job_is_also_one_of_the_verb(verb: Callable[..., None]) -> None:
    app = typer.Typer()
    app.command()(verb)
    own = {name for parameter in typer.main.get_command(app).params for name in parameter.opts}
    assert not own & {f"--{name.replace('_', '-')}" for name in _JOB_OPTIONS}


def test_options_come_before_the_site_file(site: Callable[..., Path]) -> None:
    path = site(
        partition="gpu",
        time="12:00:00",
        account="team",
        sbatch={"exclusive": True, "nice": 5},
        limits={"save": "1h"},
    )
    settings = job_settings(
        path, {"time": "30", "sbatch": ("nice=9", "hold"), "limits": ("step=5m",), "nodes": None}
    )
    assert (settings.partition, settings.time, settings.account, settings.nodes) == ("gpu", "30", "team", 1)
    assert settings.sbatch == {"exclusive": True, "nice": "9", "hold": True}
    assert settings.limits == {"save": "1h", "step": "5m"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), (7, False)),
        (("--check", "--attempts", "1"), (1, True)),
        (("--attempts=4",), (4, False)),
        (("--no-check",), (7, False)),
    ],
)
def test_attempts_and_check_on_the_command_line(
    site: Callable[..., Path], options: tuple[str, ...], expected: tuple[int, bool]
) -> None:
    """What is not given is the site file's word, and then the default."""
    seen: list[Asked] = []

    @asks_slurm
    def command(asked: Asked) -> None:
        seen.append(asked)

    app = typer.Typer()
    app.command()(command)
    path = site(attempts=7, check=False)
    app([*options, f"--site={path}"], standalone_mode=False)
    app([option for option in options if option != "--check"], standalone_mode=False)
    of_site, alone = (each.settings() for each in seen)
    assert (of_site.attempts, of_site.check) == expected
    assert (alone.attempts, alone.check) == (expected[0] if expected[0] != 7 else 3, "--no-check" not in options)


def test_attempts_that_are_none() -> None:
    with pytest.raises(UserError, match="--attempts"):
        job_settings(None, {"attempts": 0})


def test_where_the_site_file_is_looked_for(
    site: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job_settings(None, {}) == JobSettings()
    usual = tmp_path / "home" / ".config" / "ditmoe" / "site.yaml"
    usual.parent.mkdir(parents=True)
    usual.write_text("partition: usual\n")
    assert job_settings(None, {}).partition == "usual"
    monkeypatch.setenv(SITE_VARIABLE, str(site(partition="of-variable")))
    assert job_settings(None, {}).partition == "of-variable"
    (tmp_path / "other.yaml").write_text("partition: named\n")
    assert job_settings(tmp_path / "other.yaml", {}).partition == "named"
    monkeypatch.setenv(SITE_VARIABLE, str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        job_settings(None, {})


def test_times_of_a_site_file_are_no_numbers(tmp_path: Path) -> None:
    """Other readers of YAML take 12:00:00 for 43200, which sbatch would take for minutes."""
    path = tmp_path / "site.yaml"
    path.write_text("time: 12:00:00\nmem: 64\n")
    assert (job_settings(path, {}).time, job_settings(path, {}).mem) == ("12:00:00", "64")


def test_all_problems_of_a_site_file_at_once(site: Callable[..., Path]) -> None:
    path = site(
        partitoin="x",
        nodes=True,
        time="soon",
        sbatch={"output": "x"},
        limits={"sav": "1h"},
        environment={"RANK": "0"},
        container_mounts=["data"],
        preamble="a\x07",
    )
    with pytest.raises(UserError) as told:
        job_settings(path, {})
    lines = str(told.value).splitlines()
    assert lines[0] == f"{path}: 8 problems"
    for start in (
        "partitoin = 'x': no such key; did you mean partition?",
        "nodes = true: expected an integer >= 1",
        "time = 'soon': expected a time",
        "sbatch = {'output': 'x'}: output is written to the job folder",
        "limits = {'sav': '1h'}: 'sav' is no phase; expected start, step, save, evaluation",
        "environment = {'RANK': '0'}: RANK is set for each job and task",
        "container_mounts = ['data']: 'data': expected /FOLDER",
        "preamble = 'a\\x07': expected one line",
    ):
        assert any(line.strip().startswith(start) for line in lines[1:]), (start, lines)


def test_keys_are_told_by_their_own_names(site: Callable[..., Path]) -> None:
    with pytest.raises(UserError) as told:
        job_settings(site(zzz=1, limits={"step": 1.5}), {})
    assert "zzz = 1: no such key; expected one of nodes, gpus_per_node, " in str(told.value)
    assert "limits.step = 1.5: expected a duration" in str(told.value)
    assert "site." not in str(told.value).replace("site.yaml", "")


def test_all_problems_of_the_options_at_once() -> None:
    given = {"nodes": 0, "mem": "4Q", "sbatch": ("time=3",), "limits": ("save",), "container_mounts": ("x",)}
    with pytest.raises(UserError) as told:
        job_settings(None, given)
    lines = [line.strip() for line in str(told.value).splitlines()]
    assert lines[0] == "options: 5 problems"
    assert "--limit 'save': expected PHASE=DURATION, such as save=1h" in lines
    raw = "--sbatch 'time=3': time has an option of its own; expected it left out"
    for start in ("--nodes = 0: expected", "--mem = '4Q': expected", raw, "--container-mount = "):
        assert any(line.startswith(start) for line in lines), (start, lines)


def test_a_container_is_a_file_that_is_there_or_an_address(tmp_path: Path) -> None:
    (tmp_path / "x.sif").write_text("")
    assert job_settings(None, {"container": "x.sif"}).container == str(tmp_path / "x.sif")
    assert job_settings(None, {"container": "docker://x/y"}).container == "docker://x/y"
    pyxis = {"container_runtime": "pyxis"}
    assert job_settings(None, {"container": "nvcr.io#nvidia/pytorch:25.01", **pyxis}).container is not None
    with pytest.raises(UserError, match=r"--container y\.sif: no such file"):
        job_settings(None, {"container": "y.sif"})
    (tmp_path / "site.yaml").write_text("container: docker://x\n")
    assert job_settings(tmp_path / "site.yaml", {"container": "none"}).container is None


@pytest.fixture
def train(write_config: Write, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The job of a small configuration; its data are not looked at."""
    from ditmoe.data.stream.dataset import Dataset

    monkeypatch.setattr(Dataset, "check_files", lambda self: None)

    def make(*overrides: str, config: dict[str, Any] | None = None, **settings: Any) -> Any:
        return training_job(write_config(**(config or {})), list(overrides), JobSettings(**settings))

    return make


def test_what_the_supervisor_goes_by_is_in_the_job(train: Callable[..., Any]) -> None:
    job = train(nodes=2, attempts=5, check=False, limits={"step": "1m"}, time="8", chain=4).request.job
    assert (job.attempts, job.check, job.limits["step"], job.warning, job.chain) == (5, False, 60, 120, 4)


def test_a_run_is_resolved_on_nodes_times_tasks(train: Callable[..., Any], tmp_path: Path) -> None:
    job = train("train.micro_batch=null", nodes=2, tasks_per_node=4)
    assert job.config.parallel.data == 8 and job.config.train.micro_batch == 2
    assert job.request.folder.script == tmp_path / "runs" / "tiny" / "submit.sbatch"
    assert job.request.job.arguments == ("train", "--", str(tmp_path / "runs/tiny/slurm/train/config.yaml"))
    assert job.request.job.directory == str(tmp_path) and job.request.job.run == str(tmp_path / "runs/tiny")
    assert job.verdict[1].startswith("8 processes") and job.verdict[-1].endswith(
        "not checked: the job has no GPUs"
    )


def test_the_only_task_of_a_node_starts_the_ranks_of_the_configuration(train: Callable[..., Any]) -> None:
    """The configuration has launch.processes = 2."""
    job = train(nodes=2)
    assert (job.config.parallel.data, job.config.launch.processes, job.request.job.tasks_per_node) == (4, 2, 1)
    job = train(nodes=1, gpus_per_node=4, tasks_per_node=1, config={"launch": {}})
    assert (job.config.parallel.data, job.config.launch.processes, job.request.job.tasks_per_node) == (4, 4, 1)


def test_ranks_that_have_no_gpu_of_their_own(train: Callable[..., Any]) -> None:
    """The configuration has launch.processes = 2."""
    with pytest.raises(UserError, match=r"launch\.processes = 2 with --gpus-per-node 1: each process takes a GPU"):
        train(gpus_per_node=1)


def test_a_job_is_submitted_from_within_another(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `srun --pty bash`, whose variables make this process a rank of one."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    values = {name: default for name, (_, default) in _JOB_OPTIONS.items()}
    settings = Asked({**values, "nodes": 2, "tasks_per_node": 2}).settings()
    assert not {"RANK", "SLURM_JOB_ID"} & set(os.environ)
    assert train(**settings.model_dump(include={"nodes", "tasks_per_node"})).config.parallel.data == 4


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (2, "cuda")])
def test_the_device_is_named(train: Callable[..., Any], gpus: int, device: str) -> None:
    assert train(nodes=1, gpus_per_node=gpus, config={"launch": {}, "parallel": {}}).config.launch.device == device


def test_a_layout_that_does_not_fit_is_told_before_anything_waits(train: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"tiny\.yaml: 2 problems") as told:
        train("launch.processes=null", nodes=3, config={"launch": {"device": "cpu"}})
    assert "parallel.expert = 2 must divide the data ranks, parallel.data = 3" in str(told.value)


def test_devices_that_contradict_the_configuration(train: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"launch\.device = cpu with --gpus-per-node 2: expected 0"):
        train(gpus_per_node=2)
    with pytest.raises(UserError, match=r"launch\.device = cuda with --gpus-per-node 0: expected GPUs"):
        train(tasks_per_node=2, config={"launch": {"device": "cuda"}})


def test_memory_is_checked_where_the_gpu_is_known(train: Callable[..., Any]) -> None:
    large = {"launch": {}, "model": {"preset": "DiT-XL/2-8E2A", "image_size": 8, "channels": 1, "num_classes": 10}}
    asked = {"nodes": 1, "gpus_per_node": 2}
    assert "neither --gpu nor the site file says" in train(config=large, **asked).verdict[-1]
    assert train(config=large, **asked, gpu="none").verdict[-1] == train(config=large, **asked).verdict[-1]
    assert train(config=large, **asked, gpu="h200").verdict[-1].endswith("of 141 (H200 SXM): it fits")
    with pytest.raises(
        UserError, match=r"a rank of stage 0 needs \d+\.\d GiB, and a GPU has 24 \(RTX 4090\)"
    ) as told:
        train(config=large, **asked, gpu="rtx4090")
    assert "`ditmoe plan … --gpus 2 --gpu rtx4090` lists them" in str(told.value)
    with pytest.raises(UserError, match="--gpu v100: not known; expected one of h100"):
        train(config=large, **asked, gpu="v100")


def test_an_evaluation_is_of_the_checkpoint_that_is_the_newest_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ditmoe.sampling.network import load

    newest = tmp_path / "run" / "checkpoints" / "step-00000040"
    newest.mkdir(parents=True)
    monkeypatch.setattr(load, "find_checkpoint", lambda source, step: newest)
    made = evaluation_job(["run", "--count", "9"], JobSettings(nodes=2))
    assert made.job.arguments == ("evaluate", "run", "--count", "9", "--step=40")
    assert made.job.run == str(tmp_path / "run")
    assert re.fullmatch(r"evaluate-[0-9a-f]{8}", made.folder.path.name)
    named = evaluation_job(["run", "--count", "9", "--step=40"], JobSettings())
    assert named.job.arguments == made.job.arguments and named.folder == made.folder
    path = str(newest.relative_to(tmp_path))
    alone = evaluation_job([path], JobSettings())
    assert alone.job.arguments == ("evaluate", path) and alone.folder.path.parent == tmp_path / "run" / "slurm"


def test_a_watch_is_of_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run: no such folder; expected a run folder"):
        evaluation_job(["run", "--watch"], JobSettings())
    (tmp_path / "run").mkdir()
    made = evaluation_job(["run", "--watch", "--processes=2"], JobSettings())
    assert made.job.arguments == ("evaluate", "run", "--watch", "--processes=2")
    assert made.job.run == str(tmp_path / "run")


def test_each_wrong_pair_of_an_option_has_its_line() -> None:
    with pytest.raises(UserError) as told:
        job_settings(None, {"sbatch": ("job-name=x", "--exclusive"), "limits": ("stp=3",)})
    assert [line.strip() for line in str(told.value).splitlines()[1:]] == [
        "--sbatch 'job-name=x': job-name tells that a run's job is in the queue; expected it left out",
        "--sbatch '--exclusive': '--exclusive' is no option of sbatch; expected its long name without dashes, such"
        " as mail-type",
        "--limit 'stp=3': no such phase; expected one of start, step, save, evaluation; did you mean step?",
    ]


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, a VAE and a run that are as they should be; those of other tests are not there."""
    from ditmoe.data.encoding import plan, vae
    from ditmoe.sampling.network import load

    monkeypatch.setattr(vae, "read_facts", lambda path: None)
    monkeypatch.setattr(plan, "prepare_encoding", lambda *given: None)
    monkeypatch.setattr(load, "find_checkpoint", lambda source, step: Path(source, "checkpoints", "step-00000040"))


def test_what_a_dataset_is_made_of_is_looked_at_before_anything_waits(tmp_path: Path) -> None:
    """The job would wait for hours, and end within seconds."""
    with pytest.raises(UserError, match="v: no such folder; expected the local folder of a diffusers"):
        encoding_job(["shards", "out", "--vae", "v"], JobSettings())
    with pytest.raises(UserError, match="run: no such folder; expected a run folder or a checkpoint"):
        synthesis_job(["--from", "run", "drawn", "--count=9"], JobSettings())


@pytest.mark.usefixtures("inputs")
def test_a_synthesis_is_of_the_checkpoint_that_is_the_newest_now() -> None:
    """Each task looks by itself, and so does each attempt."""
    made = synthesis_job(["--from", "run", "--count=9", "--", "drawn"], JobSettings())
    assert made.job.arguments[2:] == ("--from", "run", "--count=9", "--step=40", "--", "drawn")
    named = synthesis_job(["--from", "run", "--count=9", "--step=20", "drawn"], JobSettings())
    assert named.job.arguments[2:] == ("--from", "run", "--count=9", "--step=20", "drawn")


@pytest.mark.usefixtures("inputs")
def test_jobs_that_make_datasets_lie_beside_them(tmp_path: Path) -> None:
    made = encoding_job(["shards", "out/latents", "--vae", "v", "--flips=both"], JobSettings(nodes=3))
    assert made.folder.script == tmp_path / "out" / "latents.slurm" / "submit.sbatch"
    assert made.job.arguments == ("data", "encode", "shards", "out/latents", "--vae", "v", "--flips=both")
    assert made.job.run is None and made.job.name.startswith("ditmoe-latents.slurm-")
    made = encoding_job(["shards", "out/x/..", "--vae", "v"], JobSettings())
    assert made.folder.path == tmp_path / "out.slurm"
    made = synthesis_job(["--from", "run", "drawn", "--count=9"], JobSettings())
    assert made.folder.path == tmp_path / "drawn.slurm" and made.job.verb == "synthesize"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--vae=v", "--processes=2"], "--processes: the tasks of the job are its processes"),
        (["a", "b", "--vae=v", "--overwrite"], "--overwrite: every attempt of the job would begin anew"),
        (["a", "/", "--vae=v"], "/: expected a folder with a name"),
    ],
)
def test_what_a_job_cannot_have(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoding_job(arguments, JobSettings())


def ditmoe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ditmoe.launcher", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": "/usr/bin:/bin"},
    )


def test_a_dry_run_prints_a_script_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = ditmoe("submit", "evaluate", "run", "--watch", "--dry-run", "--time=60", "--mem=2G")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=ditmoe-evaluate-")
    assert "\n#SBATCH --mem=2G\n" in done.stdout and "\n#SBATCH --time=60\n" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_the_verbs_own_mistakes_are_told_in_its_words() -> None:
    done = ditmoe("submit", "encode", "shards", "out", "--vae", "v", "--flip", "both", "--nodes", "2")
    assert done.returncode == 2 and "ditmoe encode" not in done.stdout
    assert "--flip: no such option" in done.stderr and "Traceback" not in done.stderr


def test_an_evaluation_that_follows_its_training(tmp_path: Path) -> None:
    """The run need not be there yet; the options are read as `ditmoe evaluate` reads them."""
    run = tmp_path / "run"
    settings = JobSettings(nodes=2, tasks_per_node=2, chain=3)
    request = following_evaluation(run, "--count 8 --data 'a b'", settings)
    assert request.job.arguments == ("evaluate", "--count", "8", "--data", "a b", "--", str(run))
    assert request.folder.path.parent == run / "slurm" and not run.exists()
    assert (request.job.nodes, request.job.tasks_per_node, request.job.chain) == (2, 2, 1)
    assert following_evaluation(run, "", settings).job.arguments == ("evaluate", "--", str(run))
    for options, message in (
        ("--watch", "the job follows the training, and scores its last step; expected no --watch"),
        ("--step 3", "expected no --step"),
        ("--crew crew", "expected no --crew"),
        ("'", "No closing quotation"),
        ("--processes 2", "the tasks of the job are its processes"),
    ):
        with pytest.raises(UserError, match=message):
            following_evaluation(run, options, settings)
    with pytest.raises(typer.TyperException, match="No such option: --cuont"):
        following_evaluation(run, "--cuont 3", settings)


def test_a_crew_is_led_by_one_task_of_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ditmoe.sampling.network import load

    newest = tmp_path / "run" / "checkpoints" / "step-00000040"
    newest.mkdir(parents=True)
    monkeypatch.setattr(load, "find_checkpoint", lambda source, step: newest)
    asked = ["run", "--crew", "crew", "--processes", "0"]
    made = evaluation_job(asked, JobSettings(gpus_per_node=8))
    assert made.job.arguments == ("evaluate", *asked, "--step=40")
    assert (made.job.nodes, made.job.tasks_per_node, made.job.gpus_per_node) == (1, 1, 8)
    with pytest.raises(UserError, match="--crew crew: one task leads it, on one node; expected --nodes 1"):
        evaluation_job(asked, JobSettings(nodes=2))


def test_workers_are_one_task_of_each_node_and_each_submission_has_its_own_folder(tmp_path: Path) -> None:
    crew = tmp_path / "crew"
    made = workers_job(crew, 3, 2.5, "ib0", JobSettings(nodes=4))
    job = made.job
    assert job.arguments == ("worker", "--idle=2.5", "--processes=3", "--listen=ib0", "--", str(crew))
    assert (job.verb, job.run, job.nodes, job.tasks_per_node) == ("workers", None, 4, 1)
    assert made.settings.cpus_per_task == 3 and "--cpus-per-task=3" in job.srun
    assert made.folder.path == crew / "slurm" / "workers-1" and not crew.exists()
    on_gpus = workers_job(crew, None, 10, None, JobSettings(nodes=2, gpus_per_node=8))
    assert on_gpus.job.arguments == ("worker", "--idle=10", "--gpus=8", "--", str(crew))
    assert (on_gpus.job.tasks_per_node, on_gpus.settings.cpus_per_task) == (1, None)
    # One with which nothing was submitted, as when Slurm refused, is taken again.
    made.folder.path.mkdir(parents=True)
    assert workers_job(crew, 3, 1, None, JobSettings()).folder == made.folder
    record_submission(made.folder.path, "7", 1.0)
    assert workers_job(crew, 3, 1, None, JobSettings()).folder.path.name == "workers-2"
    with pytest.raises(UserError, match="--tasks-per-node 2: one task on each node starts its workers"):
        workers_job(crew, None, 1, None, JobSettings(tasks_per_node=2))
    with pytest.raises(UserError, match="--processes 9 with --gpus-per-node 8: each worker has a GPU to itself"):
        workers_job(crew, 9, 1, None, JobSettings(gpus_per_node=8))


def test_a_dry_run_of_workers_makes_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["workers", "crew", "--nodes=2", "--processes=2", "--dry-run"], standalone_mode=False)
    script = capsys.readouterr().out
    assert "\n#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=2\n" in script
    assert not (tmp_path / "crew").exists()


def test_a_crew_that_others_may_enter_is_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    (tmp_path / "crew").mkdir()
    (tmp_path / "crew").chmod(0o755)
    with pytest.raises(UserError, match="crew: has mode 755"):
        app(["workers", "crew"], standalone_mode=False)
    assert not list((tmp_path / "crew").iterdir())


def test_a_watch_is_one_task_of_one_node(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    request = evaluation_job([str(run), "--watch", "--processes", "2"], JobSettings(gpus_per_node=8))
    assert (request.job.nodes, request.job.tasks_per_node, request.job.gpus_per_node) == (1, 1, 8)
    for settings in (JobSettings(nodes=2), JobSettings(tasks_per_node=4)):
        with pytest.raises(UserError, match="starts the processes of each evaluation itself, on one node"):
            evaluation_job([str(run), "--watch"], settings)


@pytest.mark.parametrize(("more", "submitted"), [([], []), (["--evaluate", ""], ["evaluate"])])
def test_a_complete_run_is_not_trained_again(
    write_config: Write, monkeypatch: pytest.MonkeyPatch, more: list[str], submitted: list[str]
) -> None:
    """Repeated, the command does what is left; asked for more steps, it trains them."""
    from ditmoe.data.stream.dataset import Dataset
    from ditmoe.launcher.training import progress
    from ditmoe.slurm.client import Queue
    from ditmoe.slurm.submission import submit as submission

    handed: list[Request] = []
    monkeypatch.setattr(Dataset, "check_files", lambda self: None)
    monkeypatch.setattr(Queue, "named", lambda self, *names: {})
    monkeypatch.setattr(Queue, "jobs", lambda self, jobs: {})

    def hand_in(request: Request, *rest: Any) -> list[str]:
        handed.append(request)
        return ["7"]

    monkeypatch.setattr(submission, "submit", hand_in)
    path = write_config()
    steps = training_job(path, [], JobSettings()).config.train.steps
    found = progress.Progress(config=RunConfig.model_construct(), step=steps, word="complete", signed=0.0)
    monkeypatch.setattr(progress, "read_progress", lambda run: found)
    done = CliRunner().invoke(app, ["train", str(path), *more])
    assert done.exit_code == 0, done.output
    assert f"complete at step {steps:,}; no training is submitted" in done.output
    assert [(request.job.verb, request.after) for request in handed] == [(verb, None) for verb in submitted]
    handed.clear()
    assert CliRunner().invoke(app, ["train", str(path), f"train.steps={steps + 1}", *more]).exit_code == 0
    assert [(request.job.verb, request.after) for request in handed] == [
        ("train", None),
        *((verb, "afterok:7") for verb in submitted),
    ]
