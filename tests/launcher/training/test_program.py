"""In which order a rank begins."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ditmoe.launcher.training import program


class Stopped(Exception):
    """Where the test has seen enough."""


def configured(folder: Path) -> Any:
    return SimpleNamespace(
        data=None,
        seed=0,
        launch=SimpleNamespace(device="cpu"),
        train=SimpleNamespace(tf32=True, precision="fp32", emulated_bf16=False, compile=False),
        run=SimpleNamespace(dir=folder),
    )


def test_readers_start_before_a_device_is_used_and_end_with_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events: list[str] = []
    readers = SimpleNamespace(close=lambda: events.append("readers end"))

    def started(name: str, value: Any) -> Any:
        return lambda *_: events.append(name) or value  # type: ignore[func-returns-value]

    def stop(_: object) -> None:
        raise Stopped

    monkeypatch.setattr(program, "open_dataset", started("dataset", "dataset"))
    monkeypatch.setattr(program, "start_readers", started("readers", readers))
    monkeypatch.setattr(program, "own_device", started("device", torch.device("cpu")))
    monkeypatch.setattr(program.processes, "join", stop)
    with pytest.raises(Stopped):
        program.run_training(configured(tmp_path))
    assert events == ["dataset", "readers", "device", "readers end"]


@pytest.mark.parametrize("allowed", [True, False])
def test_only_a_gpu_rounds_to_tf32(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    matmul, cudnn = SimpleNamespace(allow_tf32=None), SimpleNamespace(allow_tf32=None)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    program.set_tf32(torch.device("cpu"), allowed)
    assert matmul.allow_tf32 is None
    program.set_tf32(torch.device("cuda", 0), allowed)
    assert matmul.allow_tf32 is allowed and cudnn.allow_tf32 is allowed
