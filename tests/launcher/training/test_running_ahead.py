"""Runs whose host starts a step before it has looked at the last one are the runs of a host that does not."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from torch import Tensor

from ditmoe.parallel.checkpoint.folder import newest_checkpoint, read_weights
from tests.forked import packed_digits, run_forked

PROGRAM: Final = Path(__file__).with_name("ahead.py")
CONFIG: Final = """
run: {{dir: {run}}}
launch: {{processes: {processes}, device: cpu, threads: 1}}
model: {{depth: 1, hidden: 32, heads: 4, patch: 2, experts: 4, experts_per_token: 2}}
data: {{sources: [{{path: {shards}}}], workers: 0}}
parallel: {{expert: {processes}, zero: {zero}}}
train: {{steps: 22, batch: 8, precision: fp32, log_every: 9, checkpoint_every: 8}}
optim: {{lr: 1.0e-3, clip: 1.0}}
"""
BROKEN: Final = (11, 16, 17, 22)
"""Between records and checkpoints; at a checkpoint; the first after one; and the last. Each start looks at its
first two steps at once, to check their gradients."""
STATE: Final = ("weights", "ema", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_digits(tmp_path_factory.mktemp("data"))


@dataclass
class Seen:
    """What a run, broken off and resumed, showed."""

    lags: list[int] = field(default_factory=list)
    """The most steps that were under way when another one was started, of each start."""
    ends: list[Any] = field(default_factory=list)
    """How each start ended: its message, its state, and the newest checkpoint."""
    samples: list[str] = field(default_factory=list)
    """What was written of the samples of steps that were not finite."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Without what is of time and memory."""
    state: list[dict[str, Tensor]] = field(default_factory=list)
    """Weights, EMA and moments of the last checkpoint."""


def run_to_its_end(folder: Path, shards: Path, ahead: bool, processes: int, zero: int) -> Seen:
    """A run whose gradient is infinite in some steps; after each it is resumed without that step."""
    folder.mkdir()
    config, lag, run = folder / "run.yaml", folder / "lag.txt", folder / "run"
    config.write_text(CONFIG.format(run=run, processes=processes, zero=zero, shards=shards))
    seen = Seen()
    for turn, step in enumerate((*BROKEN, "none")):
        done = run_forked(
            [
                *(str(PROGRAM), "yes" if ahead else "no", str(step), str(lag)),
                *("train", str(config), f"train.skip_steps={list(BROKEN[:turn])}"),
            ],
            folder / "output",
            processes,
            seconds=120,
        )
        assert done.returncode == (0 if step == "none" else 2) and "Traceback" not in done.stderr, done.stderr
        seen.lags.append(int(lag.read_text()))
        errors = [line.replace(str(folder), "") for line in done.stderr.splitlines() if "error: " in line]
        assert len(set(errors)) == (step != "none"), done.stderr
        newest = newest_checkpoint(run)
        assert newest is not None
        state = json.loads((run / "state.json").read_text())
        told = str(state["reason"]).replace(str(folder), "")
        seen.ends.append((set(errors), state["state"], told, newest.name))
    seen.samples = [path.read_text() for path in sorted(run.glob("not-finite-*.json"))]
    for record in map(json.loads, (run / "stats.jsonl").read_text().splitlines()):
        of_time = {key for key in record if "second" in key} | {"memory_gib", "mfu"}
        seen.records.append({key: value for key, value in record.items() if key not in of_time})
    seen.state = [read_weights(run / "checkpoints/step-00000022", part) for part in STATE]  # type: ignore[arg-type]
    return seen


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize(("processes", "zero"), [(1, 1), (2, 3)])
def test_a_gradient_that_is_not_finite_is_met_alike(
    shards: Path, tmp_path: Path, processes: int, zero: int
) -> None:
    """Messages, checkpoints, records, and the state in the end, bit for bit; over saves and resumes."""
    ahead = run_to_its_end(tmp_path / "ahead", shards, True, processes, zero)
    at_once = run_to_its_end(tmp_path / "at once", shards, False, processes, zero)
    assert ahead.lags == [1] * 5 and at_once.lags == [0] * 5
    assert ahead.ends == at_once.ends
    assert [end[-1] for end in ahead.ends] == [f"step-{step:08d}" for step in (8, 8, 16, 16, 22)]
    for step, (errors, state, *_) in zip(BROKEN, ahead.ends, strict=False):
        assert state == "failed" and f"step {step}: the gradient's norm is" in errors.pop()
    assert ahead.samples == at_once.samples and len(ahead.samples) == len(BROKEN)
    assert ahead.records == at_once.records and ahead.records[-1]["step"] == 22
    for one, other in zip(ahead.state, at_once.state, strict=True):
        assert one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())
