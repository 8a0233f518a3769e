"""Training end to end, with real processes: kills, signals, full disks and bad data lose nothing."""

import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ditmoe.data.shards.index import load_index, write_index
from ditmoe.data.storage.stopping import EXIT_STOPPED
from ditmoe.data.stream.dataset import changed_facts
from ditmoe.launcher.configuration.run_config import load_config
from ditmoe.launcher.planning.room import room_here
from ditmoe.launcher.training.throughput import PARTS
from ditmoe.parallel.alone import TIMEOUT
from ditmoe.parallel.checkpoint.folder import PARTIAL, checkpoints, newest_checkpoint, read_info, read_weights
from ditmoe.parallel.config import OptimConfig
from tests.forked import DITMOE, packed_digits, run_forked
from tests.small_disk import small_file_system

CONFIG = """
run: {{dir: {run}}}
launch: {{processes: {processes}, device: cpu, threads: 1}}
model: {{depth: 2, hidden: 32, heads: 4, patch: 2, experts: 4, experts_per_token: 2}}
data: {{sources: [{{path: {shards}}}], workers: 1, flip: true}}
parallel: {{expert: {processes}, zero: 1}}
train: {{steps: 12, batch: 16, precision: fp32, log_every: 1, checkpoint_every: 3}}
optim: {{lr: 1.0e-3}}
"""
STAGES = "parallel.expert=1 parallel.pipe=2 train.micro_batch=4"
TENSOR_RANKS = "parallel.expert=1 parallel.tensor=2"
COMPARED = ("step", "images", "loss", "balance_loss", "grad_norm", "lr", "expert_load")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, packed."""
    return packed_digits(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_config(tmp_path: Path, shards: Path) -> Callable[..., Path]:
    """Writes the configuration of a run."""

    def make(name: str = "run", processes: int = 2, folder: Path = shards, parent: Path = tmp_path) -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(CONFIG.format(run=parent / name, processes=processes, shards=folder))
        return file

    return make


def start(config: Path, *overrides: str, **options: Any) -> subprocess.Popen[str]:
    """Start the command as a user does; it starts its ranks."""
    return subprocess.Popen(
        [sys.executable, *DITMOE, "train", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def train_by_command(config: Path, *overrides: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run to its end, started as a user does."""
    process = start(config, *overrides, **options)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run to its end; several ranks are started as by torchrun."""
    processes = load_config(config, list(overrides)).launch.processes
    assert processes is not None
    return run_forked(
        [*DITMOE, "train", str(config), *overrides],
        config.with_name("output"),
        processes if processes > 1 else None,
        seconds=120,
    )


def curve(run: Path) -> list[dict[str, Any]]:
    """What must be equal, of each record."""
    records = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    return [{key: record[key] for key in COMPARED} for record in records]


def state_of(run: Path) -> tuple[str, str]:
    """What the run says of itself, and why."""
    found = json.loads((run / "state.json").read_text())
    return found["state"], found["reason"]


def kill_everything(process: subprocess.Popen[str], run: Path) -> None:
    """kill -9 the command and all ranks (they hold the run's configuration in their command lines)."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and f"{run}.yaml" in _command_line(entry):
            os.kill(int(entry.name), signal.SIGKILL)
    process.communicate(timeout=30)


def _command_line(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def process_of_rank(rank: int, command: subprocess.Popen[str]) -> int:
    """Process id of a rank that a command has started."""
    (found,) = [
        child
        for child in Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    ]
    return int(found)


def reached(run: Path, records: int) -> Callable[[], bool]:
    """Whether so many records are written by now."""
    file = run / "stats.jsonl"
    return lambda: file.exists() and file.read_text().count("\n") >= records


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("warmup", "decay", "expected"),
    [
        (0, 0, [1, 1, 1, 1, 1]),
        (2, 0, [0.5, 1, 1, 1, 1]),
        (0, 2, [1, 1, 1, 1, 0.5]),
        (4, 2, [0.25, 0.5, 0.75, 1, 0.5]),
        (9, 9, [5 / 81, 8 / 81, 9 / 81, 8 / 81, 5 / 81]),
    ],
)
def test_learning_rate(warmup: int, decay: int, expected: list[float]) -> None:
    config = OptimConfig(lr=2.0, warmup_steps=warmup, decay_steps=decay)
    assert [config.learning_rate(step, 5) / 2 for step in range(1, 6)] == pytest.approx(expected)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[dict[str, Any]]:
    """The curve of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    file = folder / "run.yaml"
    file.write_text(CONFIG.format(run=folder / "run", processes=2, shards=shards))
    result = train(file)
    assert result.returncode == 0, result.stderr
    assert "the run is complete: step 12" in result.stdout
    found = curve(folder / "run")
    assert [record["step"] for record in found] == list(range(1, 13))
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_kill_at_a_random_step(
    make_config: Callable[..., Path], uninterrupted: list[dict[str, Any]], kills: int
) -> None:
    """Of a run that leaves its number type to the machine: so small a network is computed in fp32."""
    config, auto = make_config(), "train.precision=auto"
    run = config.with_suffix("")
    for _ in range(kills):
        done = len(curve(run)) if (run / "stats.jsonl").exists() else 0
        process = start(config, auto)
        wait_for(reached(run, done + random.randint(1, 4)), process)
        kill_everything(process, run)
        assert state_of(run) == ("training", "")
    result = (train if kills == 1 else train_by_command)(config, auto)
    assert result.returncode == 0, result.stderr
    assert (run / "log.txt").read_text().count("train.precision = auto: fp32, for ") == kills + 1
    assert "precision: fp32" in (run / "config.yaml").read_text()
    assert curve(run) == uninterrupted
    assert state_of(run) == ("complete", "")


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_killed_on_one_layout_and_continued_on_others(
    make_config: Callable[..., Path], uninterrupted: list[dict[str, Any]]
) -> None:
    """Stages, of which one is killed; then tensor ranks; then expert ranks: the curve of these alone."""
    config = make_config()
    run = config.with_suffix("")
    process = start(config, *STAGES.split())
    wait_for(reached(run, 4), process)
    killed = time.monotonic()
    os.kill(process_of_rank(1, process), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < TIMEOUT.total_seconds()  # no rank waited for one that is gone
    assert process.returncode == 128 + signal.SIGKILL and "rank 1 was killed by SIGKILL" in err, err
    for layout, steps in ((TENSOR_RANKS, 8), ("parallel.expert=2", 12)):
        result = train(config, *layout.split(), f"train.steps={steps}")
        assert result.returncode == 0, result.stderr
    found = curve(run)
    assert [record["images"] for record in found] == [record["images"] for record in uninterrupted]
    for key in ("loss", "balance_loss", "grad_norm"):
        expected = [record[key] for record in uninterrupted]
        assert [record[key] for record in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_other_ranks_and_workers_read_the_same_samples_in_the_same_order(
    make_config: Callable[..., Path], shards: Path
) -> None:
    """A mixture, killed anywhere on 2 ranks × 2 workers, and continued on 1 × 3 and 2 × 1: keys and curve."""
    sources = f"data.sources=[{{path: {shards}, max_per_class: 30}}, {{path: {shards}, weight: 3}}]"
    common = [sources, "parallel.expert=1", "data.lanes=12", "data.shuffle=20", "train.log_samples=true"]
    whole, config = make_config("whole", processes=1), make_config(processes=2)
    result = train(whole, *common, "data.workers=0")
    assert result.returncode == 0, result.stderr
    run = config.with_suffix("")
    process = start(config, *common, "data.workers=2", "train.micro_batch=4")
    wait_for(reached(run, random.randint(3, 6)), process)
    kill_everything(process, run)
    for overrides in (
        ["launch.processes=1", "data.workers=3", "train.micro_batch=8", "train.steps=8"],
        ["launch.processes=2", "data.workers=1"],
    ):
        result = train(config, *common, *overrides)
        assert result.returncode == 0, result.stderr
    expected, found = (
        [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        for run in (whole.with_suffix(""), run)
    )
    assert [record["step"] for record in found] == list(range(1, 13))
    assert found == expected and {len(record["keys"]) for record in found} == {16}
    assert all(sum("digits 0/" in key for key in record["keys"]) == 4 for record in found)
    for key in ("loss", "balance_loss", "grad_norm"):
        values = [[record[key] for record in curve(each)] for each in (whole.with_suffix(""), run)]
        assert values[1] == pytest.approx(values[0], rel=1e-5)
    last = json.loads((run / "stats.jsonl").read_text().splitlines()[-1])
    assert last["sources"]["digits 0"] == {"images": 48, "epoch": 48 / 300, "skipped": 0}
    assert last["sources"]["digits 1"]["images"] == 144


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_from_images_to_latents_to_images(
    make_config: Callable[..., Path], make_vae: Callable[..., Path], tmp_path: Path
) -> None:
    """Pack, encode, train with previews, kill, move the VAE, continue, sample: by the commands alone."""
    images, latents, vae = tmp_path / "images", tmp_path / "latents", make_vae(tmp_path / "vae")

    def ditmoe(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_forked([*DITMOE, *arguments], tmp_path / "output", seconds=120)

    pack = ditmoe("data", "pack", "shapes", str(images), "--count", "60", "--image-size", "16")
    assert pack.returncode == 0, pack.stderr
    encode = ditmoe(
        *("data", "encode", str(images), str(latents), "--vae", str(vae), "--flips", "both", "--processes", "1")
    )
    assert encode.returncode == 0, encode.stderr
    settings = ["preview.every=6", "preview.images=4", "preview.sampler.steps=2", "train.steps=6"]
    result = train(make_config("whole", processes=1, folder=latents), *settings)
    assert result.returncode == 0, result.stderr
    config = make_config(processes=1, folder=latents)
    run = config.with_suffix("")
    process = start(config, *settings)
    wait_for(reached(run, 4), process)
    kill_everything(process, run)
    # Resuming depends on what the latents are, not on where their VAE lies; a preview needs it.
    vae.rename(tmp_path / "moved")
    refused = train(config, *settings)
    assert refused.returncode == 2 and str(vae) in refused.stderr and "Traceback" not in refused.stderr
    assert "say where it lies now with data.vae=FOLDER" in refused.stderr
    result = train(config, *settings, f"data.vae={tmp_path / 'moved'}")
    assert result.returncode == 0, result.stderr
    assert curve(run) == curve(tmp_path / "whole") and len(curve(run)) == 6
    preview = Image.open(run / "samples" / "preview-step-00000006.png")
    whole = Image.open(tmp_path / "whole" / "samples" / "preview-step-00000006.png")
    assert preview.tobytes() == whole.tobytes() and preview.mode == "RGB"
    sample = ditmoe(
        *("sample", str(run), "--steps", "2", "--classes", "0", "--count", "1", "--out", str(tmp_path / "p")),
    )  # the run's configuration names the VAE's new place
    assert sample.returncode == 0, sample.stderr
    info = read_info(checkpoints(run)[-1])
    index = load_index(latents)
    assert index.latents is not None
    moved = index.latents.model_copy(update={"vae": "elsewhere", "scale": 0.5})
    other = index.model_copy(update={"latents": moved}).facts
    assert changed_facts(info.dataset, {**info.dataset, **other}) == ["encoding of latents"]
    assert not changed_facts(info.dataset, {**info.dataset, **index.facts})


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_kill_while_a_checkpoint_is_written(
    make_config: Callable[..., Path], uninterrupted: list[dict[str, Any]]
) -> None:
    config = make_config()
    run = config.with_suffix("")
    for _attempt in range(5):
        process = start(config, "train.checkpoint_every=1")
        folder = run / "checkpoints"
        wait_for(lambda: len(checkpoints(run)) >= 1, process)
        wait_for(lambda: [*folder.glob(f"*{PARTIAL}/weights/*")], process)  # noqa: B023
        kill_everything(process, run)
        if [*folder.glob(f"*{PARTIAL}")]:
            break
        shutil.rmtree(run)  # it was finished in that very moment
    else:
        pytest.fail("no kill came while a checkpoint was written")
    before = newest_checkpoint(run)
    assert before is not None
    result = train(config)
    assert result.returncode == 0, result.stderr
    assert f"resumed from {before}" in result.stdout
    assert not [*folder.glob(f"*{PARTIAL}")]
    assert curve(run) == uninterrupted


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_one_rank_is_killed_while_a_checkpoint_is_written(
    make_config: Callable[..., Path], uninterrupted: list[dict[str, Any]]
) -> None:
    """The others end, with its name, and what they have written of the checkpoint counts for nothing."""
    config = make_config()
    run = config.with_suffix("")
    folder = run / "checkpoints"
    for _attempt in range(5):
        process = start(config, "train.checkpoint_every=1", "train.steps=200")
        wait_for(lambda: len(checkpoints(run)) >= 1, process)
        rank = process_of_rank(1, process)
        wait_for(lambda: [*folder.glob(f"*{PARTIAL}/weights/*")], process)
        os.kill(rank, signal.SIGKILL)
        killed = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - killed < TIMEOUT.total_seconds()  # no rank waited for one that is gone
        assert process.returncode == 128 + signal.SIGKILL, err
        assert "error: rank 1 was killed by SIGKILL" in err and "the others were ended" in err, err
        if [*folder.glob(f"*{PARTIAL}")]:
            break
        shutil.rmtree(run)  # it was finished in that very moment
    else:
        pytest.fail("no kill came while a checkpoint was written")
    before = newest_checkpoint(run)
    assert before is not None
    # Its steps may be more than the whole run's by now: those of the records are compared.
    steps = max(12, int(before.name[-8:]) + 2)
    result = train(config, f"train.steps={steps}")
    assert result.returncode == 0, result.stderr
    assert f"resumed from {before}" in result.stdout
    assert not [*folder.glob(f"*{PARTIAL}")]
    assert curve(run)[:12] == uninterrupted and len(curve(run)) == steps


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_one_rank_cannot_write(make_config: Callable[..., Path], uninterrupted: list[dict[str, Any]]) -> None:
    """All ranks stop at the same step, with one message; nothing is lost."""
    config = make_config()
    run = config.with_suffix("")
    process = start(config, "train.checkpoint_every=3", "train.steps=100000")
    wait_for(lambda: newest_checkpoint(run), process)
    resource.prlimit(process_of_rank(1, process), resource.RLIMIT_FSIZE, (30_000, 30_000))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert err.count("error:") == 1 and "Traceback" not in err, err
    assert "could not be written" in err and "File too large" in err
    newest = newest_checkpoint(run)
    assert newest is not None and f"newest complete checkpoint is {newest}" in err
    assert not [*(run / "checkpoints").glob(f"*{PARTIAL}")]
    steps = max(12, int(newest.name[-8:]) + 2)
    result = train(config, f"train.steps={steps}")
    assert result.returncode == 0, result.stderr
    assert f"resumed from {newest}" in result.stdout
    assert curve(run)[:12] == uninterrupted and len(curve(run)) == steps


@pytest.mark.timeout(120)
def test_the_best_checkpoints_stay(make_config: Callable[..., Path]) -> None:
    """By the training loss, and whether training waits for the disk or not."""
    for asynchronous in ("true", "false"):
        config = make_config(f"asynchronous-{asynchronous}", processes=1)
        run = config.with_suffix("")
        settings = (f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep_last=1", "checkpoint.keep_best=2")
        result = train(config, *settings)
        assert result.returncode == 0, result.stderr
        loss = [record["loss"] for record in curve(run)]
        means = {step: sum(loss[step - 3 : step]) for step in (3, 6, 9, 12)}
        best = sorted(means, key=means.__getitem__)[:2]
        assert [int(path.name[-8:]) for path in checkpoints(run)] == sorted({*best, 12})
        for step in means:
            assert f"saved {run}/checkpoints/step-{step:08d}: copied in" in result.stdout


SIGNALLED = """
import os, signal, sys, threading, time
from pathlib import Path
from ditmoe.launcher.cli import main

run = Path(sys.argv.pop(1))

def ask():
    records = run / "stats.jsonl"
    while not (records.exists() and records.read_text().count("\\n") >= 2):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=ask, daemon=True).start()
try:
    main()
except SystemExit as end:  # not by that code, at which the others would be killed
    Path(f"{run}-{os.environ['RANK']}.code").write_text(str(end.code))
"""


@pytest.mark.timeout(120)
def test_ranks_that_are_asked_to_stop_save_and_go_on_later(
    make_config: Callable[..., Path], uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Each by itself, whenever it hears of it: they stop at one step, with a code of its own, and in the midst of
    a profile, of which the run says that there is none."""
    config, program = make_config(), tmp_path / "signalled.py"
    run = config.with_suffix("")
    program.write_text(SIGNALLED)
    # More steps than are compared: however late the signal comes, it comes while the run goes on.
    steps = ["train.checkpoint_every=1000", "train.steps=1000", "train.profile=100"]
    arguments = [str(program), str(run), "train", str(config), *steps]
    done = run_forked(arguments, tmp_path / "output", processes=2, seconds=90)
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr
    assert [Path(f"{run}-{rank}.code").read_text() for rank in range(2)] == [str(EXIT_STOPPED)] * 2
    check_stopped(run, done.stdout, "SIGTERM")
    assert "no profile: the run stops after step" in done.stdout and not any(run.glob("profile/*/*"))
    result = train(config)
    assert result.returncode == 0, result.stderr
    assert curve(run)[: len(uninterrupted)] == uninterrupted


def check_stopped(run: Path, out: str, reason: str) -> None:
    assert f"stopped by {reason} at step" in out and "repeat the command to continue" in out
    state, told = state_of(run)
    assert state == "stopped" and told.startswith(f"stopped by {reason} at step")


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT"), (signal.SIGUSR1, "SIGUSR1 on rank 1")],
)
def test_a_signal_saves_and_ends_with_a_code_of_its_own(
    make_config: Callable[..., Path], uninterrupted: list[dict[str, Any]], number: signal.Signals, reason: str
) -> None:
    """To the command, which passes it on; or to one rank alone, as a batch system's node may get it first."""
    config = make_config()
    run = config.with_suffix("")
    # More steps than are compared: however late the signal comes, it comes while the run goes on.
    process = start(config, "train.checkpoint_every=1000", "train.steps=1000")
    wait_for(reached(run, 2), process)
    os.kill(process.pid if number != signal.SIGUSR1 else process_of_rank(1, process), number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, err
    assert "error" not in err
    check_stopped(run, out, reason)
    result = train(config)
    assert result.returncode == 0, result.stderr
    assert curve(run)[: len(uninterrupted)] == uninterrupted


@pytest.mark.timeout(120)
def test_a_damaged_checkpoint_is_passed_over(
    make_config: Callable[..., Path], uninterrupted: list[dict[str, Any]]
) -> None:
    config = make_config()
    run = config.with_suffix("")
    assert train(config, "train.steps=6").returncode == 0
    newest = newest_checkpoint(run)
    assert newest is not None and newest.name == "step-00000006"
    file = next((newest / "exp_avg").iterdir())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = train(config)
    assert result.returncode == 0, result.stderr
    assert "skipped a checkpoint: " in result.stdout and file.name in result.stdout
    assert "resumed from" in result.stdout and "step-00000003: step 3" in result.stdout
    assert curve(run) == uninterrupted


@pytest.mark.timeout(120)
def test_data_may_move_but_not_change(make_config: Callable[..., Path], shards: Path, tmp_path: Path) -> None:
    """A position in the sample order stands for the same sample before and after a resume."""
    config = make_config(processes=1)
    assert train(config, "train.steps=2").returncode == 0
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    result = train(config, "train.steps=4", f"data.sources.0.path={moved}")
    assert result.returncode == 0, result.stderr
    assert "changed since the run was started: data.sources" in result.stdout and "resumed from" in result.stdout
    index = load_index(moved)
    write_index(moved, index.model_copy(update={"shards": index.shards[:-1], "samples": None}))
    result = train(config, "train.steps=6", f"data.sources.0.path={moved}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "data.sources: the samples, or their order, are not those that" in result.stderr
    assert "step-00000004 was trained on (another choice of samples, shards)" in result.stderr


@pytest.mark.timeout(120)
def test_a_loss_that_is_not_finite_stops_the_run(make_config: Callable[..., Path]) -> None:
    config = make_config(processes=1)
    run = config.with_suffix("")
    assert train(config, "train.steps=3").returncode == 0
    result = train(config, "optim.lr=1e25")
    assert result.returncode == 2
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
    assert "the loss is " in result.stderr or "norm is" in result.stderr
    assert "The last good checkpoint is" in result.stderr and "step-00000003" in result.stderr
    assert "digits-" in result.stderr and ".tar/" in result.stderr
    problem = json.loads(next(run.glob("not-finite-step-*.json")).read_text())
    assert len(problem["samples"]) == 16 and len(set(problem["samples"])) == 16
    assert f"train.skip_steps = [{problem['step']}]" in result.stderr
    state, told = state_of(run)
    assert state == "failed" and f"step {problem['step']}" in told
    # It goes on with another learning rate, without the steps that failed.
    result = train(config, f"train.skip_steps=[2, 4, {problem['step']}]", "train.steps=7")
    assert result.returncode == 0, result.stderr
    assert "changed since the run was started: optim.lr: 1e+25 before" in result.stdout
    assert "train.skip_steps: [2] are done already" in result.stdout
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    rates = [(entry["step"], entry["now"]) for entry in history if entry.get("key") == "optim.lr"]
    assert rates == [(3, 1e25), (3, load_config(config, []).optim.lr)]


@pytest.mark.timeout(200)
def test_a_skipped_step_consumes_its_samples_and_changes_nothing(make_config: Callable[..., Path]) -> None:
    """On a resume it is the same run; and the weights, moments and EMA before and after it are the same."""
    skipping = (
        "train.skip_steps=[4, 5]",
        "train.checkpoint_every=1",
        "checkpoint.keep_last=9",
        "train.log_every=2",
        "train.peak_tflops=1",
    )
    once, twice = make_config("once"), make_config("twice")
    result = train(once, *skipping, "train.steps=8", "train.log_samples=true")
    assert result.returncode == 0, result.stderr
    assert "step 4: skipped, without an update, as train.skip_steps says" in result.stdout
    run = once.with_suffix("")
    for part in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        third, fifth, sixth = (
            read_weights(run / "checkpoints" / f"step-{step:08d}", part)  # type: ignore[arg-type]
            for step in (3, 5, 6)
        )
        assert all(tensor.equal(fifth[name]) for name, tensor in third.items())
        assert not all(tensor.equal(sixth[name]) for name, tensor in third.items())
    records = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [(each["step"], each["images"], each.get("skipped_steps")) for each in records] == [
        (2, 32, None),
        (4, 64, [4]),
        (6, 96, [5]),
        (8, 128, None),
    ]
    assert all(each["loss"] is not None for each in records)
    # Images of skipped steps pass, and no arithmetic was done on them.
    for_image = [each["mfu"] / each["images_per_second"] for each in records]
    assert for_image == pytest.approx([for_image[0] * share for share in (1, 0.5, 0.5, 1)])
    assert len((run / "samples.jsonl").read_text().splitlines()) == 8
    skips = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["skipped"]) for entry in skips] == [(4, True), (5, True)]
    assert train(twice, *skipping, "train.steps=5").returncode == 0
    assert train(twice, *skipping, "train.steps=8").returncode == 0
    again = [json.loads(line) for line in (twice.with_suffix("") / "stats.jsonl").read_text().splitlines()]
    # The last step of the first start has a record of its own.
    compared = [key for key in COMPARED if key in records[-1]]
    assert [again[-1][key] for key in compared] == [records[-1][key] for key in compared]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("layout", ["parallel.zero=0", "parallel.zero=3", STAGES])
def test_drawing_previews_changes_nothing(make_config: Callable[..., Path], layout: str) -> None:
    """Also where the EMA has to be gathered for it, or stages gone through; and the grid is there to be seen."""
    curves = []
    for every in ("null", "2"):
        config = make_config(f"every-{every}")
        overrides = (*layout.split(), "train.steps=6", f"preview.every={every}", "preview.sampler.steps=3")
        result = train(config, *overrides, "preview.images=5", "preview.sampler.sampler=heun")
        assert result.returncode == 0, result.stderr
        curves.append(curve(config.with_suffix("")))
        told = "warning: previews: heun with 3 steps" in (config.with_suffix("") / "log.txt").read_text()
        assert told == (every == "2")
    assert curves[0] == curves[1]
    assert sorted(path.name for path in (config.with_suffix("") / "samples").iterdir()) == [
        f"preview-step-{step:08d}.png" for step in (2, 4, 6)
    ]
    # A line over the images says the step, one below each its class; TensorBoard has the same picture.
    board = EventAccumulator(str(config.with_suffix("") / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert [event.step for event in board.Images("samples from the EMA")] == [2, 4, 6]
    titles = []
    for event in board.Images("samples from the EMA"):
        path = config.with_suffix("") / "samples" / f"preview-step-{event.step:08d}.png"
        picture = np.asarray(Image.open(path))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), picture)
        assert len(picture) == 20 + 96 + 2 + 15 + 2 and (picture[-17:] < 128).any()
        titles.append(picture[:20].tobytes())
    assert len(set(titles)) == 3


@pytest.mark.timeout(60)
def test_the_clock_covers_all_that_a_run_waits_for(make_config: Callable[..., Path], tmp_path: Path) -> None:
    """Previews, records and checkpoints are in images/s: the records' time is the time between them."""
    previews = ("preview.every=1", "preview.images=16", "preview.sampler.steps=40")
    done = train(make_config("drawn", processes=1), *previews, "train.checkpoint_every=1", "train.steps=6")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "drawn" / "stats.jsonl").read_text().splitlines()]
    for record in records:
        parts = [record[f"{part}_seconds"] for part in PARTS]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(record["step_seconds"])
        assert record["images_per_second"] == pytest.approx(16 / record["step_seconds"])
    written = EventAccumulator(str(tmp_path / "drawn" / "tensorboard")).Reload().Scalars("train/loss")
    passed = written[-1].wall_time - written[0].wall_time
    counted = [record["step_seconds"] for record in records[1:]]
    assert sum(counted) == pytest.approx(passed, rel=0.2)
    # What the clock left out before; each is in the record after.
    for part in ("save", "preview"):
        assert records[0][f"{part}_seconds"] < records[1][f"{part}_seconds"]
    assert sum(record["preview_seconds"] for record in records[1:]) > 0.2 * passed
    log = (tmp_path / "drawn" / "log.txt").read_text()
    assert "Preview (s): " in log and re.search(r"after the last record: save [\d.]+ s, preview [\d.]+ s", log)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MB."""
    with small_file_system(tmp_path / "disk", 16) as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_full_disk(
    make_config: Callable[..., Path], small_disk: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    config = make_config(parent=small_disk)
    run = small_disk / "run"
    first = train(config, "train.steps=3")
    assert first.returncode == 0, first.stderr
    ballast = run / "ballast"
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with ballast.open("r+b") as file:
        file.truncate(ballast.stat().st_size - 200_000)  # logs fit, a checkpoint does not
    result = train_by_command(config)
    assert result.returncode == 2, result.stdout
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr, result.stderr
    assert "No space left on device" in result.stderr and "could not be written" in result.stderr
    assert "newest complete checkpoint is" in result.stderr and "step-00000003" in result.stderr
    assert not [*(run / "checkpoints").glob(f"*{PARTIAL}")]
    state, told = state_of(run)
    assert state == "failed" and "No space left on device" in told
    ballast.unlink()
    result = train(config)
    assert result.returncode == 0, result.stderr
    assert curve(run) == uninterrupted


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("left", [0, 100_000])
def test_a_disk_that_fills_under_the_records(
    make_config: Callable[..., Path], small_disk: Path, processes: int, left: int
) -> None:
    """One message, whether nothing was left before the start, or as much as the first records take."""
    config = make_config(parent=small_disk, processes=processes)
    ballast = small_disk / "ballast"
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with ballast.open("r+b") as file:
        file.truncate(ballast.stat().st_size - left)
    records = ["train.log_samples=true", "train.checkpoint_every=100000", "train.steps=100000"]
    result = train_by_command(config, *records)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr, result.stderr
    assert "could not be written (No space left on device)" in result.stderr, result.stderr
    assert "newest complete checkpoint is none yet; free some space" in result.stderr, result.stderr


@pytest.mark.timeout(120)
def test_a_file_that_may_not_grow(make_config: Callable[..., Path]) -> None:
    """The same without root: the system refuses files beyond a size."""
    config = make_config(processes=1)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = train_by_command(config, preexec_fn=limit)
    assert result.returncode == 2
    assert "could not be written" in result.stderr and "File too large" in result.stderr
    assert "none yet" in result.stderr


def break_image(folder: Path) -> str:
    """Spoil the pixels of the first sample, keeping the tar's size."""
    shard = sorted(folder.glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    at = content.index(b"IDAT")
    content[at + 4 : at + 30] = bytes(26)
    shard.write_bytes(content)
    return shard.name


def break_label(folder: Path) -> str:
    index = load_index(folder)
    fewer = {"num_classes": 4, "class_names": index.class_names[:4], "samples": None}
    write_index(folder, index.model_copy(update=fewer))
    return "0 to 3"


def break_size(folder: Path) -> str:
    index = load_index(folder)
    write_index(folder, index.model_copy(update={"image_size": 16}))
    return "16"


def break_tar(folder: Path) -> str:
    shard = sorted(folder.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-2048])
    return shard.name


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", [break_image, break_label, break_size, break_tar])
def test_bad_data(
    make_config: Callable[..., Path], shards: Path, tmp_path: Path, fault: Callable[[Path], str]
) -> None:
    """One message that names the shard and the sample; no traceback."""
    folder = tmp_path / "broken"
    shutil.copytree(shards, folder)
    expected = fault(folder)
    result = train(make_config(processes=1, folder=folder), "train.steps=200")
    assert result.returncode == 2, result.stdout
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr, result.stderr
    assert ".tar" in result.stderr and expected in result.stderr, result.stderr


@pytest.mark.timeout(120)
def test_bad_data_that_are_skipped(make_config: Callable[..., Path], shards: Path, tmp_path: Path) -> None:
    """They are named in the log and counted, the curve is that of no other run, and beyond the budget it ends."""
    folder = tmp_path / "broken"
    shutil.copytree(shards, folder)
    shard = sorted(folder.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:-2048])
    config = make_config(processes=1, folder=folder)
    skipping = f"data.sources=[{{path: {folder}, on_error: skip}}]"
    result = train(config, skipping, "train.log_samples=true")
    assert result.returncode == 0, result.stderr
    run = config.with_suffix("")
    records = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    skipped = [record["sources"]["digits"]["skipped"] for record in records]
    assert skipped == sorted(skipped) and 40 < skipped[-1] < 16 * 12
    log = (run / "log.txt").read_text()
    assert log.count(f"skipped {shard}: truncated: ") == skipped[-1] or "more" in log
    keys = [key for line in (run / "samples.jsonl").read_text().splitlines() for key in json.loads(line)["keys"]]
    assert len(keys) == 16 * 12 and not any(key.startswith(shard.name) for key in keys)
    # The count goes on where the run was left, and the budget holds over a resume.
    skipping = f"data.sources=[{{path: {folder}, on_error: skip, skip_budget: {skipped[-1] + 5}}}]"
    result = train(config, skipping, "train.steps=40")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{shard}: truncated: " in result.stderr and f"its skip_budget is {skipped[-1] + 5}" in result.stderr


def test_a_run_too_large_for_this_machine_ends_at_once(make_config: Callable[..., Path], tmp_path: Path) -> None:
    """By the memory of wherever the tests run: before any process starts, and before the run has a folder."""
    huge = ["model.depth=1000", "model.hidden=8192", "model.experts=0", "parallel.expert=1"]
    done = run_forked([*DITMOE, "train", str(make_config()), *huge], tmp_path / "output")
    assert done.returncode == 2 and "cannot hold the run" in done.stderr, done.stderr
    assert f"the machine has {room_here(on_cpu=True).host / 2**30:.1f}" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.timeout(280)
def test_a_run_on_gpus(make_config: Callable[..., Path], figures: list[tuple[str, str]]) -> None:
    """Previews, checkpoints copied through pinned memory, a resume that goes on, a step that is not finite."""
    count = min(2, torch.cuda.device_count())
    settings = ["launch.device=cuda", "train.precision=bf16", "preview.every=2", "preview.images=4"]
    once, twice = make_config("once", count), make_config("twice", count)
    for config, steps in ((once, 6), (twice, 4), (twice, 6)):
        result = train_by_command(config, *settings, f"train.steps={steps}", "train.checkpoint_every=2")
        assert result.returncode == 0, result.stderr
    runs = [config.with_suffix("") for config in (once, twice)]
    assert len(list((runs[0] / "samples").glob("preview-step-*.png"))) == 3
    one, other = (read_weights(run / "checkpoints" / "step-00000006", "weights") for run in runs)
    # Not every kernel sums in one order, and Adam makes whole steps out of gradients that are nothing but rounding
    # (those of the keys' biases): so the mean of all numbers, and not the worst.
    apart = sum(float((one[name] - other[name]).abs().sum()) for name in one)
    before = read_weights(runs[0] / "checkpoints" / "step-00000004", "weights")
    way = sum(float((one[name] - before[name]).abs().sum()) for name in one)
    figures.append((f"{count} GPU: weights of a resumed run, from one run's (of 2 steps)", f"{apart / way:.0%}"))
    assert apart < 0.25 * way
    records, resumed = (
        [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()] for run in runs
    )
    assert [record["step"] for record in records] == list(range(1, 7))
    assert all(math.isfinite(record["loss"]) for record in (*records, *resumed))
    pairs = [(a[key], b[key]) for a, b in zip(records, resumed, strict=True) for key in ("loss", "grad_norm")]
    worst = max(abs(a / b - 1) for a, b in pairs)
    figures.append((f"{count} GPU: losses and norms of a resumed run against those of one run", f"{worst:.1e}"))
    assert worst < 0.02
    step = sorted(record["step_seconds"] for record in records)[len(records) // 2]
    figures.append((f"{count} GPU: seconds of a step of the tests' network", f"{step:.3f}"))
    broken = train_by_command(once, *settings, "train.steps=12", "optim.lr=1e25", "train.log_every=6")
    assert broken.returncode == 2 and "nothing of this step was saved" in broken.stderr, broken.stderr
