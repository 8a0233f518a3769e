"""Steps are looked at one later where the host runs ahead, and at once where something follows them."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ditmoe.launcher.training import updates
from ditmoe.launcher.training.feed import StepBatch
from ditmoe.launcher.training.updates import Updates
from ditmoe.model.errors import UserError
from ditmoe.parallel.engine import training_engine
from ditmoe.parallel.engine.training_engine import NonFiniteLossError, StepResult


class Engine:
    """Starts steps whose losses are given, and writes down in which order they are started and looked at."""

    def __init__(self, losses: list[float], requests: list[int] | None = None) -> None:
        self.step, self.losses, self.events = 0, losses, list[str]()
        self.requests = requests or [0] * len(losses)
        self.device, self.layout = torch.device("cpu"), SimpleNamespace(offload=False)

    def start_step(self, *_: object) -> Any:
        self.step += 1
        number = self.step
        self.events.append(f"start {number}")

        def result() -> StepResult:
            self.events.append(f"look at {number}")
            loss = self.losses[number - 1]
            if not math.isfinite(loss):
                raise NonFiniteLossError(loss)
            return StepResult(loss, 0.0, torch.ones(1, 1), 1.0, self.requests[number - 1])

        return SimpleNamespace(result=result)


def taken(
    monkeypatch: pytest.MonkeyPatch, folder: Path, engine: Engine, steps: int, ahead: bool = True
) -> tuple[Updates, list[float], list[int]]:
    """Take so many steps of a run that has a record every three; the losses counted, and the requests known."""
    monkeypatch.setattr(training_engine, "runs_ahead", lambda _: ahead)
    monkeypatch.setattr(updates.processes, "gather_objects", lambda value: [value])
    monkeypatch.setattr(updates.dist, "get_rank", lambda: 0)
    train = SimpleNamespace(steps=7, log_every=3, checkpoint_every=100, skip_steps=())
    config: Any = SimpleNamespace(train=train, preview=SimpleNamespace(every=None))
    saver: Any = SimpleNamespace(wait=lambda: 0.0)
    losses: list[float] = []
    found = Updates(
        config,
        SimpleNamespace(path=folder),
        saver,
        engine,
        lambda result: losses.append(result.loss),  # type: ignore[arg-type]
    )
    batches = [StepBatch([], [], [f"shard.tar/{step}"], []) for step in range(1, steps + 1)]
    return found, losses, [found.take(batch, 1e-3, False) for batch in batches]


def test_a_step_is_looked_at_after_the_next_was_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Engine([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    _, losses, _ = taken(monkeypatch, tmp_path, engine, 7)
    assert losses == engine.losses
    assert ", ".join(engine.events) == (
        "start 1, start 2, look at 1, start 3, look at 2, look at 3, "
        "start 4, start 5, look at 4, start 6, look at 5, look at 6, start 7, look at 7"
    )


def test_a_host_that_computes_itself_looks_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Engine([1.0, 2.0])
    taken(monkeypatch, tmp_path, engine, 2, ahead=False)
    assert engine.events == ["start 1", "look at 1", "start 2", "look at 2"]


def test_a_stop_is_heard_one_step_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And everything is known then, as a checkpoint follows."""
    engine = Engine([1.0, 2.0, 3.0], [2, 0, 0])
    found, losses, requests = taken(monkeypatch, tmp_path, engine, 2)
    assert requests == [0, 2] and losses == [1.0, 2.0] and found.look_at_last() == 0


def test_a_loss_that_is_not_finite_is_told_of_its_own_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = Engine([1.0, math.nan, 3.0, 4.0])
    with pytest.raises(UserError, match=r"^step 2: the loss is nan.*shard\.tar/2 .*train\.skip_steps = \[2\]"):
        taken(monkeypatch, tmp_path, engine, 4)
    assert engine.events[-1] == "look at 2"
    assert (tmp_path / "not-finite-step-00000002.json").exists()
