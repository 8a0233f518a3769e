"""A run that this machine cannot hold is refused before it starts, with the numbers and what would fit."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ditmoe.launcher.cli import app
from ditmoe.launcher.configuration.resolve import resolve
from ditmoe.launcher.configuration.run_config import RunConfig, load_config
from ditmoe.launcher.planning import room as module
from ditmoe.launcher.planning.room import Room, check_room, group_limits
from ditmoe.launcher.planning.train_dry_run import largest_stage
from ditmoe.model.errors import UserError

GIB = 2**30
Write = Callable[..., Path]
MODEL = {"preset": "DiT-S/2-8E2A", "image_size": 32, "channels": 4, "num_classes": 1000}


def resolved(path: Path, processes: int, *overrides: str) -> RunConfig:
    config = load_config(path, list(overrides))
    return resolve(config, None, processes)


def with_model(write_config: Write, **train: Any) -> Path:
    given = {"batch": 256, "precision": "bf16", **train}
    return write_config(launch={}, model=MODEL, parallel={}, train=given, data={"sources": [{"path": "shards"}]})


def refused(config: RunConfig, ranks: int, room: Room) -> str | None:
    try:
        check_room(config, "photos.yaml", ranks, room)
    except UserError as error:
        return str(error)
    return None


def keys_of(message: str) -> list[str] | None:
    """What a message says would fit, where that is keys."""
    found = re.search(r"^nearest that fits: ((?:[a-z_.]+=\S+ )+)\(", message, re.MULTILINE)
    return found[1].split() if found else None


def test_a_gpu_that_is_too_small_is_named_with_the_nearest_that_fits(write_config: Write) -> None:
    path = with_model(write_config)
    config = resolved(path, 1)
    _, memory = largest_stage(config)
    message = refused(config, 1, Room(64 * GIB, False, (16 * GIB,)))
    assert message is not None and message.startswith("photos.yaml: this machine cannot hold the run")
    assert f"a rank needs {memory.peak / GIB:.1f} GiB; the GPU has 16.0, 92% of them for a run" in message
    assert f"activations {memory.activations / GIB:.2f}" in message
    # Only the micro-batch is changed, to the largest that fits.
    assert keys_of(message) == ["train.micro_batch=64"]
    assert "to start all the same: launch.check_memory=false" in message and "nothing was started" in message
    assert refused(resolved(path, 1, "train.micro_batch=64"), 1, Room(64 * GIB, False, (16 * GIB,))) is None
    assert refused(resolved(path, 1, "train.micro_batch=128"), 1, Room(64 * GIB, False, (16 * GIB,))) is not None
    # Where the driver says nothing of the GPUs, only the machine's memory counts.
    assert refused(config, 1, Room(64 * GIB, False)) is None


def test_host_memory_counts_too(write_config: Write) -> None:
    path = with_model(write_config, micro_batch=16)
    config = resolved(path, 4)
    room = Room(5 * GIB, False, (80 * GIB,) * 4)
    message = refused(config, 4, room)
    assert message is not None and "host memory: 4 processes of the run" in message and "has 5.0" in message
    assert keys_of(message) == ["checkpoint.asynchronous=false"]
    assert refused(resolved(path, 4, "checkpoint.asynchronous=false"), 4, room) is None
    # Half of the ranks on each of two machines.
    assert refused(config, 2, room) is None


def test_on_a_cpu_the_run_itself_is_in_the_machine_s_memory(write_config: Write) -> None:
    path = with_model(write_config, precision="fp32")
    config = resolved(path, 2, "launch.device=cpu")
    assert refused(config, 2, Room(200 * GIB, True)) is None
    message = refused(config, 2, Room(24 * GIB, True))
    assert message is not None and "GPU" not in message.replace("to start", "")
    keys = keys_of(message)
    assert keys is not None and "offload" not in message
    assert refused(resolved(path, 2, "launch.device=cpu", *keys), 2, Room(24 * GIB, True)) is None
    nothing = refused(config, 2, Room(1 * GIB, True))
    assert nothing is not None and "nearest that fits: fewer launch.processes, a smaller network" in nothing


@pytest.mark.parametrize("seed", range(4))
def test_what_a_refusal_proposes_is_not_refused(write_config: Write, seed: int) -> None:
    """On random machines: refused is what does not fit and nothing else, and what is proposed fits."""
    path = with_model(write_config)
    rng = random.Random(seed)
    proposed = 0
    for _ in range(6):
        ranks = rng.choice([1, 2, 4, 8])
        room = Room(round(rng.uniform(2, 40) * GIB), False, (round(rng.uniform(3, 40) * GIB),) * ranks)
        config = resolved(path, ranks)
        message = refused(config, ranks, room)
        if largest_stage(config)[1].peak > 0.92 * room.gpus[0]:
            assert message is not None and "GPU memory: " in message
        if message is None or (keys := keys_of(message)) is None:
            continue
        proposed += 1
        assert refused(resolved(path, ranks, *keys), ranks, room) is None, (keys, message)
    assert proposed


def test_offload_and_then_more_gpus_are_proposed(write_config: Write) -> None:
    path = write_config(launch={}, model={**MODEL, "preset": "DiT-XL/2-8E2A"}, parallel={}, train={"batch": 64})
    config = resolved(path, 1)
    room = Room(200 * GIB, False, (24 * GIB,))
    message = refused(config, 1, room)
    assert message is not None
    keys = keys_of(message)
    assert keys is not None and "parallel.offload=true" in keys
    assert refused(resolved(path, 1, *keys), 1, room) is None
    little = refused(config, 1, Room(32 * GIB, False, (24 * GIB,)))
    assert little is not None and re.search(r"nearest that fits: \d+ GPUs of 24 GiB", little)


def test_train_refuses_and_can_be_told_to_insist(
    write_config: Write, shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_config(run={"dir": str(tmp_path / "run")})
    (shards / "tiny-000000.tar").write_bytes(b"0" * 1000)
    asked: list[bool] = []
    started: list[Any] = []

    def small(on_cpu: bool) -> Room:
        asked.append(on_cpu)
        return Room(GIB // 2, on_cpu)

    monkeypatch.setattr(module, "room_here", small)
    monkeypatch.setattr("ditmoe.launcher.local.launch.spawn", lambda *args, **kwargs: started.append(args) or 0)
    done = CliRunner().invoke(app, ["train", str(path)])
    assert isinstance(done.exception, UserError) and "host memory: 2 processes" in str(done.exception)
    assert asked == [True] and not started and not (tmp_path / "run").exists()
    CliRunner().invoke(app, ["train", str(path), "launch.check_memory=false"])
    assert len(started) == 1 and len(asked) == 1
    # A rank of torchrun looks for itself; one that we started does not.
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    done = CliRunner().invoke(app, ["train", str(path)])
    assert isinstance(done.exception, UserError) and "host memory: 2 processes" in str(done.exception)


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """The limit of a group, and of those around it, in both versions of the interface."""
    groups, mounted = tmp_path / "cgroup", tmp_path / "fs"
    job = mounted / "slurm" / "job_7" / "step_0"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text("8589934592\n")
    (mounted / "slurm" / "memory.max").write_text("17179869184\n")
    groups.write_text("0::/slurm/job_7/step_0\n")
    assert group_limits(groups, mounted) == [8589934592, 17179869184]
    old = mounted / "memory" / "docker" / "abc"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("1073741824\n")
    groups.write_text("12:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/elsewhere\n")
    assert group_limits(groups, mounted) == [1073741824]
    assert group_limits(tmp_path / "none", mounted) == []
    assert all(limit > 0 for limit in group_limits())
