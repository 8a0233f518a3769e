"""Drawing with compiled blocks: the same images to rounding, and the same bits whatever is drawn beside them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from ditmoe.launcher.cli import app
from ditmoe.model.compiling.blocks import compiled_blocks
from ditmoe.model.dit import DiT, call_block
from ditmoe.model.errors import UserError
from ditmoe.sampling.comparison.cells import ComparedSampler
from ditmoe.sampling.drawing.generate import generate, generate_float
from ditmoe.sampling.network import compiled
from ditmoe.sampling.network.compiled import rows_of, with_compiled_blocks
from ditmoe.sampling.network.load import LoadedModel
from ditmoe.sampling.service.errors import ServiceError
from ditmoe.sampling.service.requests import ImageRequest, parse
from ditmoe.sampling.settings.config import SamplerConfig
from tests.sampling.conftest import LivelyModel
from tests.sampling.small_run import write_run

BATCH = 3


class Shapes:
    """In place of compiled blocks: keeps what is prepared and computed, and computes as ever."""

    def __init__(self) -> None:
        self.prepared: list[int] = []
        self.computed: set[int] = set()

    def prepare(self, network: DiT, images: int) -> float:
        self.prepared.append(images)
        return 0.0

    def __call__(self, block: Any, x_BTD: Tensor, condition_BD: Tensor) -> Tensor:
        self.computed.add(len(x_BTD))
        return call_block(block, x_BTD, condition_BD)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shapes]:
    made = Shapes()
    monkeypatch.setattr(compiled, "compiled_blocks", lambda with_gradients: made)
    yield made


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, [2]),
        ({"cfg_scale": 2.0}, [4]),
        ({"cfg_scale": 2.0, "cfg_sigma_max": 1.0}, [2, 4]),
        ({"sampler": "rk45", "tolerance": 0.5, "cfg_scale": 2.0}, [4]),
        ({"sampler": "heun", "cache_interval": 2, "steps": 6}, [2]),
    ],
)
def test_what_is_compiled_is_what_is_computed(
    lively_model: LivelyModel,
    shapes: Shapes,
    settings: dict[str, Any],
    rows: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the shards of a batch of 3 images, which are of 2: no thread meets rows that were not prepared."""
    monkeypatch.setattr("ditmoe.sampling.drawing.generate.SHARD_TOKENS", 2 * 16)
    model = lively_model()
    config = SamplerConfig.model_validate({"sampler": "euler", "steps": 4, "compile": True, **settings})
    compiled_images = generate(model, None, range(5), config, BATCH).image_NHWC
    assert shapes.prepared == rows == rows_of(2, config) and shapes.computed == set(rows)
    plain = config.model_copy(update={"compile": False})
    assert torch.equal(generate(model, None, range(5), plain, BATCH).image_NHWC, compiled_images)
    assert shapes.prepared == rows, "without the option the network is itself"
    assert with_compiled_blocks(model.network, 2, plain) is model.network


def test_the_setting_is_part_of_what_images_are_told_by() -> None:
    plain = SamplerConfig(steps=3)
    assert "compile" not in plain.plain(), "evaluations of before keep their names"
    assert SamplerConfig(steps=3, compile=True).plain()["compile"] is True


def test_the_service_and_comparisons_refuse_it() -> None:
    with pytest.raises(ServiceError, match=r"compile: .*not compiled"):
        parse(ImageRequest, b'{"compile": true}')
    assert not parse(ImageRequest, b'{"compile": false}').compile
    with pytest.raises(ValueError, match="compile is not for one sampler"):
        ComparedSampler.model_validate({"sampler": "euler", "compile": True})


def test_a_command_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = CliRunner().invoke(app, ["sample", str(run), "--compile", "--count", "1", "--device", "cpu"])
    assert isinstance(done.exception, UserError)
    assert "--compile: this machine lacks the C++ compiler no-such-compiler" in str(done.exception)
    assert not (run / "samples").exists()


EVEN, ODD = {}, {"hidden": 20, "tokens_across": 3}
CASES = {
    "euler": ({"steps": 4}, EVEN),
    "guided in part": ({"sampler": "heun", "steps": 3, "cfg_scale": 2.0, "cfg_sigma_max": 2.0}, EVEN),
    "dense": ({"steps": 4}, {"experts": 0}),
    "odd sizes": ({"steps": 4}, ODD),
    "bf16": ({"steps": 4, "precision": "bf16"}, EVEN),
}


def differences(model: LoadedModel, config: SamplerConfig) -> tuple[Tensor, list[float]]:
    """Images 0 to 9 in batches of 4, and how far some of them are off among others, elsewhere, and beside others
    that are drawn in another thread."""
    whole = generate_float(model, None, range(10), config, 4).image_NCHW
    some = generate_float(model, torch.tensor([4, 2, 0, 2]), [9, 2, 5, 7], config, 4).image_NCHW
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = generate_float(model, None, range(10), config, 4).image_NCHW
    finally:
        torch.set_num_threads(threads)
    return whole, [float((some - whole[[9, 2, 5, 7]]).abs().max()), float((again - whole).abs().max())]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_an_image_has_the_same_bits_in_any_company(lively_model: LivelyModel, case: str) -> None:
    """Wherever it has them without a compiler, as it has in batches of even sizes."""
    settings, shape = CASES[case]
    model = lively_model(**shape)
    config = SamplerConfig.model_validate({"sampler": "euler", "compile": True, **settings})
    plain, without = differences(model, config.model_copy(update={"compile": False}))
    whole, with_code = differences(model, config)
    assert case in ("odd sizes", "bf16") or without == [0, 0]
    assert all(off == 0 for off, allowed in zip(with_code, without, strict=True) if allowed == 0), with_code
    bound = 1e-4 if config.precision == "fp32" else 0.1
    torch.testing.assert_close(whole, plain, rtol=bound, atol=bound)
    assert not torch.equal(whole, plain), "the same bits: was anything compiled?"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_threads_compile_nothing(lively_model: LivelyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditmoe.sampling.drawing.generate.SHARD_TOKENS", 2 * 16)
    model, config = lively_model(), SamplerConfig(sampler="euler", steps=3, compile=True)
    with_compiled_blocks(model.network, 2, config)
    torch.set_num_threads(2)
    before = compiled_blocks(with_gradients=False).seconds
    with torch._dynamo.config.patch(error_on_recompile=True):
        first = generate(model, None, range(8), config, 4).image_NHWC
        assert torch.equal(generate(model, None, range(8), config, 4).image_NHWC, first)
    assert compiled_blocks(with_gradients=False).seconds == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_compiles_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    arguments = ["sample", str(run), "--compile", "--count", "4", "--steps", "2", "--device", "cpu"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "compiled a block in" in done.output and "_compiled_" in done.output
