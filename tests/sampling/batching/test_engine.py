"""Images of many users at once: the same bits alone and in any company, turns, cancellation, memory."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditmoe.data.storage.files import make_folder
from ditmoe.parallel.checkpoint.folder import checkpoint_path, read_info
from ditmoe.sampling.batching.engine import Cancelled, Engine, NotFinite, OneImage, Ticket
from ditmoe.sampling.batching.models import ModelKey, Models, ModelUnavailable, parameters_of
from ditmoe.sampling.batching.passes import Call, Passes
from ditmoe.sampling.batching.queue import USERS_SHARE, FairQueue, QueueFull
from ditmoe.sampling.drawing.generate import generate
from ditmoe.sampling.network.load import load_model
from ditmoe.sampling.settings.config import SamplerConfig
from tests.sampling.small_run import write_checkpoint, write_run

CPU = torch.device("cpu")
ROWS = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_run(tmp_path_factory.mktemp("runs") / "digits")
    write_checkpoint(path, 1)
    return path


@pytest.fixture
def passes_made() -> list[int]:
    return []


@pytest.fixture
def engine(passes_made: list[int]) -> Iterator[Engine]:
    made = Engine(Models(CPU, 2**30, ROWS, passes_made.append), at_once=ROWS, limit=100)
    yield made
    made.close()
    assert not made.alive


def ticket(run: Path, number: int, user: str = "a", step: int = 0, **settings: object) -> Ticket:
    key = ModelKey(checkpoint_path(run, step), "ema", "fp32")
    sampler = SamplerConfig.model_validate({"sampler": "heun", "steps": 3, **settings})
    return Ticket(user, key, number % 10, [number], sampler)


def drawn(engine: Engine, tickets: list[Ticket]) -> list[OneImage]:
    engine.submit(tickets)
    return [each.drawn.result(timeout=120)[0] for each in tickets]


SETTINGS = (
    {"sampler": "heun", "steps": 3},
    {"sampler": "heun", "steps": 3, "cfg_scale": 2.0},
    {"sampler": "euler", "steps": 7},
    {"sampler": "kar2", "steps": 4, "seed": 5},
    {"sampler": "euler-maruyama", "steps": 5, "corrector_steps": 1},
    {"sampler": "rk45", "tolerance": 1e-2},
    {"sampler": "dpm-solver++", "steps": 4, "cfg_scale": 0.5},
    {"sampler": "heun", "steps": 6, "cache_interval": 2, "cfg_scale": 2.0, "cfg_sigma_max": 20.0},
)


def test_an_image_has_the_same_bits_alone_and_in_any_company(
    engine: Engine, run: Path, passes_made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: bytes would hide all but the largest differences."""
    monkeypatch.setattr("ditmoe.sampling.batching.engine.to_uint8", lambda image: image)

    def asked(order: list[int]) -> list[Ticket]:
        return [ticket(run, number, step=number % 2, **SETTINGS[number % len(SETTINGS)]) for number in order]

    alone = [drawn(engine, asked([number]))[0] for number in range(28)]
    assert max(passes_made) <= 2  # rows of a pass
    passes_made.clear()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        order = torch.randperm(28, generator=generator).tolist()
        for number, image in zip(order, drawn(engine, asked(order)), strict=True):
            assert torch.equal(image.image_HWC, alone[number].image_HWC) and image.nfe == alone[number].nfe
    assert sum(passes_made) / len(passes_made) > 2, "they did share passes"


def test_images_are_those_of_a_run(engine: Engine, run: Path) -> None:
    """To rounding: `generate` draws in batches."""
    images = drawn(engine, [ticket(run, number, cfg_scale=1.5) for number in range(8)])
    config = SamplerConfig(sampler="heun", steps=3, cfg_scale=1.5)
    expected = generate(load_model(run, step=0), torch.arange(8), range(8), config, 8)
    difference = torch.stack([image.image_HWC for image in images]).int() - expected.image_NHWC.int()
    assert difference.abs().max() <= 1
    assert {image.nfe for image in images} == {5}


def test_one_bad_request_is_told_and_others_go_on(engine: Engine, run: Path, tmp_path: Path) -> None:
    good, gone = ticket(run, 3), ticket(tmp_path / "none", 0)
    wild = ticket(run, 4, cfg_scale=1e38, steps=20)
    engine.submit([gone, wild, good])
    with pytest.raises(ModelUnavailable, match="none"):
        gone.drawn.result(timeout=60)
    with pytest.raises(NotFinite):
        wild.drawn.result(timeout=60)[0].checked()
    assert good.drawn.result(timeout=60)[0].checked().finite


def test_a_cancelled_image_ends_between_steps(engine: Engine, run: Path, passes_made: list[int]) -> None:
    endless = [ticket(run, number, steps=20_000, schedule="own") for number in range(ROWS)]
    waits = ticket(run, 1)
    engine.submit([*endless, waits])
    while len(passes_made) < 20:
        threading.Event().wait(0.01)
    engine.cancel([waits])
    with pytest.raises(Cancelled):
        waits.drawn.result(timeout=0)
    engine.cancel(endless)
    for each in endless:
        with pytest.raises(Cancelled):
            each.drawn.result(timeout=60)
    assert engine.waiting == 0 and engine.alive
    assert drawn(engine, [ticket(run, 2)])[0].finite


def test_a_network_that_fails_fails_its_images_alone(engine: Engine, run: Path) -> None:
    drawn(engine, [ticket(run, 0)])
    loaded = next(iter(engine._models.loaded().values()))
    hook = loaded.model.network.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("boom")))
    lost = ticket(run, 1)
    engine.submit([lost])
    with pytest.raises(RuntimeError, match="network failed"):
        lost.drawn.result(timeout=60)
    hook.remove()
    assert drawn(engine, [ticket(run, 1)])[0].finite


def test_users_take_turns() -> None:
    queue: FairQueue[str] = FairQueue(4)
    queue.put("a", ["a1", "a2", "a3"])
    queue.put("b", ["b1"])
    queue.put("c", ["c1", "c2"])
    assert [queue.take() for _ in range(7)] == ["a1", "b1", "c1", "a2", "c2", "a3", None]


def test_the_queue_is_bounded() -> None:
    queue: FairQueue[int] = FairQueue(3)
    queue.put("a", [1, 2])
    with pytest.raises(QueueFull, match="3 at most"):
        queue.put("a", [3, 4])
    assert len(queue) == 2
    for user in range(USERS_SHARE - 1):
        queue.put(user, [0, 0, 0])
    with pytest.raises(QueueFull, match="12 at most"):
        queue.put("z", [0, 0])
    queue.put("z", [0] * 50, bounded=False)
    assert queue.remove("a", 1) and not queue.remove("a", 1) and not queue.remove("nobody", 1)


def test_networks_are_kept_within_the_memory(run: Path) -> None:
    size = parameters_of(read_info(checkpoint_path(run, 0))) * 4
    loads: list[str] = []
    first, second = (ModelKey(checkpoint_path(run, step), "ema", "fp32") for step in (0, 1))
    models = Models(CPU, 2 * size - 1, ROWS, on_load=lambda seconds, reason: loads.append(reason))
    with models.use(first, "warm_up"), models.use(first):
        assert len(loads) == 1
        other = threading.Thread(target=lambda: models.use(second).__enter__())
        other.start()
        other.join(timeout=0.3)
        assert other.is_alive() and list(models.loaded()) == [first], "it is in use, and there is room for one"
    other.join(timeout=60)
    assert not other.is_alive() and list(models.loaded()) == [second] and loads == ["warm_up", "request"]
    with pytest.raises(ModelUnavailable, match="at most"), Models(CPU, size - 1, ROWS).use(first):
        pass


def test_a_pickle_is_no_checkpoint(tmp_path: Path) -> None:
    """It is refused by its checksum, and read as a pickle by nobody."""
    path = write_run(tmp_path / "run")
    mark = tmp_path / "mark"
    for file in (checkpoint_path(path, 0) / "ema").iterdir():
        file.write_bytes(b"cos\nmkdir\n(V" + str(mark).encode() + b"\ntR.")
    make_folder(tmp_path)
    with pytest.raises(ModelUnavailable), Models(CPU, 2**30, ROWS).use(ticket(path, 0).model):
        pass
    assert not mark.exists()


def test_where_rows_depend_on_each_other_each_has_a_pass_of_its_own() -> None:
    """As a kernel that rounds by the company would: here by the mean of the batch."""

    def network(input_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        return input_BCHW + 1e-6 * input_BCHW.mean()

    made: list[int] = []
    passes = Passes(network, ROWS, (1, 4, 4), 10, CPU, made.append)
    assert not passes.together
    input_BCHW = torch.randn(5, 1, 4, 4)
    calls = [Call(passes, row[None], torch.zeros(1), torch.zeros(1, dtype=torch.int64)) for row in input_BCHW]
    passes.run(calls)
    outputs = [call.output_BCHW for call in calls]
    passes.run(calls[3:4])
    assert made == [1] * 6 and outputs[3] is not None and torch.equal(calls[3].output_BCHW, outputs[3])  # type: ignore[arg-type]
