"""Evaluations as jobs: what they may ask for, by whom they are done, and that no kill loses one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import psutil
import pytest
import typer
from typer.testing import CliRunner

from ditmoe.launcher.commands import evaluate as evaluate_command
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import checkpoint_path
from ditmoe.sampling.evaluation.of_run import EvaluationOptions
from ditmoe.sampling.service.client import Client, Refused
from ditmoe.sampling.service.jobs import evaluating
from ditmoe.sampling.service.jobs.evaluating import JOB_VARIABLE, end_processes
from ditmoe.sampling.service.jobs.evaluators import Evaluators, named_references
from ditmoe.sampling.service.listing import Listing
from ditmoe.sampling.service.requests import EvaluationJob
from ditmoe.sampling.settings.names import FeatureName
from tests.markers import change_marker
from tests.sampling.service.conftest import serving, until
from tests.sampling.service.served import processes_of
from tests.sampling.small_run import write_digits, write_run

EVALUATED = {"model": "digits", "count": 12, "steps": 2, "sampler": "euler", "recogniser": False}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("real") / "digits")


@pytest.fixture
def scored(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of which one knows its real images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = write_run(tmp_path / "runs" / "digits")
    change_marker(
        checkpoint_path(run, 0),
        lambda facts: facts["config"].update(data={"sources": [{"path": str(shards)}]}),
    )
    return tmp_path / "runs"


def write_statistics(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    return path


def asked_for(**fields: Any) -> EvaluationJob:
    return EvaluationJob.model_validate({"kind": "evaluate", **EVALUATED, **fields})


def told(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> tuple[EvaluationOptions, dict[str, Any]]:
    """What the command that is started understands: its options, and how it shares them out."""
    got: list[EvaluationOptions] = []

    class Heard(Exception):
        pass

    def hear(options: EvaluationOptions) -> None:
        got.append(options)
        raise Heard

    monkeypatch.setattr("ditmoe.sampling.evaluation.of_run.prepare_job", hear)
    app = typer.Typer()
    app.command()(evaluate_command.command)
    assert arguments[0] == "evaluate"
    done = CliRunner().invoke(app, list(arguments[1:]))
    assert isinstance(done.exception, Heard), done.output
    shared = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument)
    return got[0], {name: shared[name] for name in ("processes", "crew")}


def test_a_process_is_told_all_that_was_asked_for(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By names alone: the files are the service's."""
    weights = scored / "inception.pth"
    weights.write_bytes(b"x")
    statistics = write_statistics(scored / "references" / "adm.npz")
    listed = Listing(scored).find("digits", None)
    evaluators = Evaluators({"inception": weights}, {}, scored / "references", processes=3, crew=scored / "crew")
    for fields in (
        {},
        {"features": "inception", "resize": "tensorflow", "reference": "adm.npz", "keep": "npz"},
        {"features": ["classifier", "inception"], "resize": "tensorflow"},
        {"reference": "adm.npz", "reference_network": "dinov2", "neighbour_images": 99, "keep": "statistics"},
        {"on_error": "skip", "labels": "balanced", "weights": "ema", "recogniser": True, "seed": 3},
        {"sampler": "dlg:kar1", "dlg": {"samples_per_chain": 3, "sigma_min": 0.1}, "cfg_scale": 1.5},
    ):
        options = evaluators.options(asked_for(**fields), listed)
        if fields.get("reference"):
            assert options.data == str(statistics)
        heard, shared = told(evaluators.arguments(options), monkeypatch)
        assert str(heard.data) == str(options.data)
        plain = [{**vars(each), "data": None, "sampler": each.sampler.plain()} for each in (heard, options)]
        assert plain[0] == plain[1]
        assert shared == {"processes": "3", "crew": str(scored / "crew")}


def test_what_there_is_is_listed(scored: Path) -> None:
    write_statistics(scored / "references" / "adm.npz")
    (scored / "references" / "edm.pkl").write_bytes(b"x")
    (scored / "references" / "notes.txt").write_text("x")
    file = scored / "dinov2.safetensors"
    file.write_bytes(b"x")
    evaluators = Evaluators({"dinov2": file}, {"shards": str(scored)}, scored / "references")
    with serving(scored, evaluators=evaluators) as client:
        assert client.get("/v1/evaluators").json() == {
            "features": ["classifier", "dinov2"],
            "references": ["adm.npz", "shards"],
        }


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"features": "inception"}, "features", "without --inception FILE"),
        ({"features": "/etc/passwd"}, "features", "should be"),
        ({"features": ["classifier", "classifier"]}, None, "expected each once"),
        ({"features": ["classifier", "dinov2"]}, "features", "without --dinov2 FILE"),
        ({"features_path": "/etc/passwd"}, "features_path", "no such key"),
        ({"reference": "none.npz"}, "reference", "none is called"),
        ({"reference": "../references/adm.npz"}, "reference", "none is called"),
        ({"reference": "pipe:id"}, "reference", "none is called"),
        ({"reference": "http://localhost/x.npz"}, "reference", "none is called"),
        ({"reference": 1}, "reference", "string"),
        ({"resize": "tensorflow"}, None, "goes with features inception"),
        ({"reference_network": "dinov2"}, None, "goes with reference"),
        ({"neighbour_images": 7}, "neighbour_images", "greater than or equal to 8"),
        ({"keep": "all"}, "keep", "should be"),
        ({"cache": "/tmp"}, "cache", "no such key"),
        ({"vae": "/tmp"}, "vae", "no such key"),
        ({"index": "/tmp"}, "index", "no such key"),
        ({"data": "/tmp"}, "data", "no such key"),
        ({"processes": 2}, "processes", "no such key"),
        ({"crew": "/tmp"}, "crew", "no such key"),
    ],
)
def test_no_path_comes_from_a_request(
    client: httpx.Client, asked: dict[str, Any], param: str | None, message: str
) -> None:
    reply = client.post("/v1/jobs", json={"kind": "evaluate", **EVALUATED, **asked})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param) and message in error["message"], reply.text


def test_a_file_that_is_not_there_is_told_at_the_start(tmp_path: Path) -> None:
    for given, message in (
        ({"files": {"inception": tmp_path / "none"}}, "--inception .*none: no such file"),
        ({"references": {"a": str(tmp_path / "none")}}, "--reference a=.*none: no such file"),
        ({"references": {"a": str(tmp_path / "none.npz")}}, "none.npz: could not be read"),
    ):
        with pytest.raises(UserError, match=message):
            Evaluators(**given)  # type: ignore[arg-type]
    pickle = tmp_path / "edm.pkl"
    pickle.write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="never opened"):
        Evaluators(references={"a": str(pickle)})
    assert named_references(["a=b", "c=x=y"]) == {"a": "b", "c": "x=y"}
    for wrong in (["a"], ["=b"], ["a="], ["a=b", "a=c"]):
        with pytest.raises(UserError, match="--reference"):
            named_references(wrong)
    assert set(get_args(FeatureName)) == {"classifier", "inception", "dinov2"}, "the options of the service"


def sleeper(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Any:
    """In place of an evaluation: a process that starts another, and ends the second time."""
    code = (
        "import os, subprocess, sys, time\n"
        "mark = sys.argv[1]\n"
        "first = not os.path.exists(mark)\n"
        "open(mark, 'a').write(f'{os.getpid()}\\n')\n"
        "if first:\n"
        "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "    time.sleep(600)\n"
    )
    mark = str(log.with_name("mark"))
    return subprocess.Popen([sys.executable, "-c", code, mark], env={**os.environ, **environment})


def test_a_process_that_is_stopped_is_replaced_with_all_that_it_started(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "STOPPED_SECONDS", 0.5)
    state = tmp_path / "state"
    with serving(scored, state=state, start_child=sleeper) as client:
        ours = Client(str(client.base_url))
        job_id = ours.give("evaluate", **EVALUATED)
        until(lambda: len(processes_of(job_id)) == 2)
        first = processes_of(job_id)
        pid = int((state / "jobs" / job_id / "mark").read_text())
        os.kill(pid, signal.SIGSTOP)
        assert ours.wait(job_id)["status"] == "completed"
        assert not any(process.is_running() and process.status() != "zombie" for process in first)
        assert len((state / "jobs" / job_id / "mark").read_text().split()) == 2
        assert processes_of(job_id) == []


def test_processes_of_a_job_end_wherever_they_are(tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    process = sleeper([], log, {JOB_VARIABLE: "job-a"})
    (tmp_path / "other").mkdir()
    other = sleeper([], tmp_path / "other" / "output.txt", {JOB_VARIABLE: "job-b"})
    until(lambda: len(processes_of("job-a")) == 2 and len(processes_of("job-b")) == 2)
    os.kill(process.pid, signal.SIGKILL)  # what it started is nobody's now
    process.wait()
    end_processes("job-a")
    assert processes_of("job-a") == [] and len(processes_of("job-b")) == 2
    end_processes("job-b")
    assert processes_of("job-b") == []
    other.wait()


def test_a_process_that_is_killed_too_often_is_given_up(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "MOST_ATTEMPTS", 3)
    started: list[float] = []

    def killed(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Any:
        started.append(time.monotonic())
        return subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])

    with serving(scored, start_child=killed) as client:
        ours = Client(str(client.base_url))
        with pytest.raises(Refused, match="ended by signal 9 3 times"):
            ours.wait(ours.give("evaluate", **EVALUATED))
    assert len(started) == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_evaluation_is_done_by_a_process_that_may_be_killed(scored: Path, tmp_path: Path) -> None:
    """The figures are those of the command; a process that is killed is started again."""
    with serving(scored, state=tmp_path / "state") as client:
        ours = Client(str(client.base_url))
        job_id = ours.give("evaluate", **EVALUATED)
        until(lambda: bool(processes_of(job_id)) or ours.job(job_id)["status"] == "failed")
        assert ours.job(job_id)["error"] is None
        os.kill(processes_of(job_id)[0].pid, signal.SIGKILL)
        assert ours.wait(job_id)["progress"] == {"done": 12, "total": 12}
        figures = ours.figures(job_id)
        assert np.isfinite(figures["results"]["classifier"]["fid"])
        assert "metrics.json" in ours.files(job_id) and ours.image(job_id, 11).size == (8, 8)
        other = ours.give("evaluate", **{**EVALUATED, "count": 11, "steps": 100_000})
        until(lambda: ours.job(other)["status"] == "in_progress")
        ours.cancel(other)
        with pytest.raises(Refused, match="cancelled"):
            ours.wait(other)
        with pytest.raises(Refused, match="noise-classifier"):
            ours.give("evaluate", **{**EVALUATED, "sampler": "dlg:euler"})


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_evaluation_by_several_processes_against_a_file(scored: Path, shards: Path, tmp_path: Path) -> None:
    """A crew of two, one of which is killed; the reference is a file that `ditmoe reference make` made."""
    from ditmoe.launcher.commands.scoring.reference import make

    (scored / "references").mkdir()
    make(str(shards), scored / "references" / "own.safetensors", recogniser=False, cache=tmp_path / "cache")
    asked = {**EVALUATED, "count": 100, "reference": "own.safetensors", "keep": "npz"}
    evaluators = Evaluators(folder=scored / "references", processes=2)
    with serving(scored, state=tmp_path / "state", evaluators=evaluators) as client:
        ours = Client(str(client.base_url))
        job_id = ours.give("evaluate", **asked)

        def workers() -> list[psutil.Process]:
            return [process for process in processes_of(job_id) if "spawn_main" in " ".join(process.cmdline())]

        until(lambda: len(workers()) >= 2)
        workers()[0].kill()
        ours.wait(job_id)
        figures = ours.figures(job_id)
        assert figures["evaluation"]["processes"] == 2
        assert "own.safetensors" in str(figures["results"]["classifier"]["real"])
        assert "samples.npz" in ours.files(job_id)
        with pytest.raises(Refused, match="kept no chunks"):
            ours.image(job_id, 0)
        assert processes_of(job_id) == []
