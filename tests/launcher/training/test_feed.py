"""A step's samples on their way to a GPU: nothing waits for them but what computes with them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ditmoe.data.stream.stream import Batch
from ditmoe.launcher.training import feed
from ditmoe.launcher.training.feed import Feed, StepBatch
from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.objective import make_objective
from ditmoe.parallel.layout import Layout
from tests.pretend.gpu import Gpu, pretended_gpu
from tests.pretend.tensors import WrongDevice

LAYOUT = Layout(pipe=1, data=1, expert=1, tensor=1, zero=1, micro_batch=2, accumulation=2)


def batches() -> Iterator[Batch]:
    first = 0
    while True:
        positions = list(range(first, first + LAYOUT.micro_batch))
        image_BCHW = torch.full((2, 1, 8, 8), first, dtype=torch.uint8)
        yield Batch(image_BCHW, torch.tensor(positions) % 10, positions, [f"a.tar/{p}" for p in positions], [])
        first += LAYOUT.micro_batch


@pytest.fixture
def make_feed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A feed of these batches to a device."""
    streams: list[Any] = []

    def opened(*_: Any) -> Any:
        streams.append(batches())
        return streams[-1]

    monkeypatch.setattr(feed, "open_stream", opened)
    monkeypatch.setattr(feed, "dealing_of", lambda *_, **__: None)
    config: Any = SimpleNamespace(
        seed=3,
        data=None,
        model=SimpleNamespace(label_dropout=0.5, num_classes=10, experts=0),
    )

    def make(device: torch.device, kind: Any = "ddpm") -> Feed:
        dataset: Any = None
        return Feed(config, dataset, make_objective(ObjectiveConfig(kind=kind)), LAYOUT, device, 0, 0)

    return make


def tensors(step: StepBatch) -> list[torch.Tensor]:
    """All of a step's."""
    return [
        tensor
        for batch in step.micro_batches
        for tensor in (
            batch.x_BCHW,
            batch.label_B,
            batch.draws.noise_BCHW,
            batch.draws.timestep_B,
            batch.draws.drop_B,
        )
    ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """One that the feed's thread has as well."""
    with pretended_gpu(index=1, count=2) as found:
        watched = partial(ThreadPoolExecutor, initializer=lambda: found.watch().__enter__())
        monkeypatch.setattr(feed, "ThreadPoolExecutor", watched)
        yield found


@pytest.mark.parametrize("kind", ["ddpm", "rectified_flow"])
def test_a_gpu_gets_the_same_numbers_without_a_wait(make_feed: Any, gpu: Gpu, kind: str) -> None:
    with make_feed(torch.device("cpu"), kind) as plain:
        expected = [tensors(plain.next_step()) for _ in range(3)]
    with make_feed(gpu.device, kind) as fed:
        steps = [tensors(fed.next_step()) for _ in range(3)]
        assert all(tensor.device == gpu.device for step in steps for tensor in step)
        used = [tensor * 1 for step in steps for tensor in step]  # the stream has waited for the copies
    assert not gpu.waits, gpu.waits
    for found, wanted in zip(used, (tensor for step in expected for tensor in step), strict=True):
        assert found.cpu().equal(wanted)


def test_the_copies_are_in_a_stream_that_computing_waits_for(
    make_feed: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed.Arrival, "precede", lambda self: None)
    with make_feed(gpu.device) as fed:
        step = fed.next_step()
        with pytest.raises(WrongDevice, match="a stream uses a copy"):
            step.micro_batches[0].x_BCHW * 1


def test_memory_that_is_not_pinned_would_be_found(
    make_feed: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    with make_feed(gpu.device) as fed:
        fed.next_step()
    assert gpu.waits.total() >= 10, "two micro-batches of five tensors"
