"""Runs with compiled blocks, started as a user does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ditmoe.launcher.configuration.checks import check_compile
from ditmoe.launcher.configuration.sections import TrainConfig
from ditmoe.model.compiling.folder import PREFIX, VARIABLE
from ditmoe.parallel.checkpoint.folder import newest_checkpoint, read_weights
from ditmoe.parallel.config import ParallelConfig
from tests.forked import DITMOE, packed_digits

CONFIG = """
run: {{dir: {run}}}
launch: {{processes: 1, device: cpu, threads: 1}}
model: {{depth: 2, hidden: 32, heads: 4, patch: 2, experts: 4, experts_per_token: 2}}
data: {{sources: [{{path: {shards}}}], workers: 1, flip: true}}
train: {{steps: 8, batch: 16, precision: fp32, log_every: 1, checkpoint_every: 6, compile: true, profile: 2}}
preview: {{every: 6, images: 4, sampler: {{steps: 2}}}}
optim: {{lr: 1.0e-3}}
"""


@pytest.mark.parametrize(
    ("parallel", "named"),
    [
        ({"zero": 3}, ["parallel.zero = 3"]),
        ({"tensor": 2}, ["parallel.tensor = 2"]),
        ({"zero": 3, "tensor": 2}, ["parallel.zero = 3", "parallel.tensor = 2"]),
        ({"zero": 2, "pipe": 1, "expert": 2, "activation_checkpointing": True}, []),
        ({"zero": 1, "pipe": 2}, []),
    ],
)
def test_layouts_whose_blocks_cannot_be_compiled_are_refused(parallel: dict[str, Any], named: list[str]) -> None:
    layout = ParallelConfig.model_validate(parallel)
    problems = check_compile(layout, TrainConfig(compile=True))
    assert len(problems) == len(named)
    for problem, name in zip(problems, named, strict=True):
        assert (
            problem.startswith(f"train.compile = true with {name}: ")
            and "expected train.compile = false" in problem
        )
    assert check_compile(layout, TrainConfig()) == []


def train(config: Path, *overrides: str, **variables: str) -> str:
    """Run to its end; what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    done = subprocess.run(
        [sys.executable, *DITMOE, "train", str(config), *overrides],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**environment, **variables},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in records(run)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_compiles_before_its_clock_runs(tmp_path: Path) -> None:
    """It has the curve, previews, a profile and the names of weights of a run without a compiler."""
    shards, scratch = packed_digits(tmp_path / "data"), tmp_path / "scratch"
    scratch.mkdir()

    def configured(name: str) -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(CONFIG.format(run=tmp_path / name, shards=shards))
        return file

    printed = train(configured("compiled"), TMPDIR=str(scratch))
    found = re.search(r"compiled a block in ([\d.]+) s", printed)
    assert found and float(found[1]) > 1
    assert records(tmp_path / "compiled")[0]["step_seconds"] < float(found[1]) / 4
    assert not list(scratch.glob(f"{PREFIX}*")), "what was compiled is removed"
    times = json.loads((tmp_path / "compiled/profile/step-00000004/profile.json").read_text())[0]["parts"]
    assert all(times[part][way] > 0 for part in ("attention", "experts") for way in ("forward", "backward"))
    assert (tmp_path / "compiled/samples/preview-step-00000006.png").exists()

    train(configured("plain"), "train.compile=false", "train.profile=null")
    for with_code, without in zip(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), strict=True):
        assert with_code == pytest.approx(without, rel=1e-4)
    names = []
    for run in ("compiled", "plain"):
        checkpoint = newest_checkpoint(tmp_path / run)
        assert checkpoint is not None
        names.append(sorted(read_weights(checkpoint, "ema")))
    assert names[0] == names[1]
