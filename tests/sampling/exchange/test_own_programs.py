"""DiT's and SiT's own programs beside ours, on files that they wrote: their networks, their samplers, their noise.

Their licences forbid commercial use, so none of their code is here. The tests run on the checkouts that
DITMOE_DIT_CODE and DITMOE_SIT_CODE name, and are left out without (docs/coming-from.md).
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditmoe.sampling.drawing.generate import generate_float
from ditmoe.sampling.drawing.noise import ImageNoise
from ditmoe.sampling.drawing.pixels import as_bytes
from ditmoe.sampling.network.load import LoadedModel, load_model
from ditmoe.sampling.settings.config import SamplerConfig
from tests.forked import DITMOE, run_forked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOLERANCE = 1e-5
"""Of the largest value."""
SMALL: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 64,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 10,
}
S2: dict[str, Any] = SMALL | {
    "input_size": 32,
    "hidden_size": 384,
    "depth": 12,
    "num_heads": 6,
    "num_classes": 1000,
}
SHAPES = {
    "small": SMALL | {"learn_sigma": True},
    "small without a sigma": SMALL | {"learn_sigma": False},
    "S/2": S2 | {"learn_sigma": True},
}
NUMBERS, SEED, CHANNELS = [0, 1, 5], 3, 3
"""Images, and the channels that both programs guide."""


@dataclass(frozen=True)
class Peer:
    """One of their networks, and ours that was made of its file."""

    network: nn.Module
    """Theirs: (x, t, y) → prediction, and `forward_with_cfg`."""
    build: Callable[[], nn.Module]
    """Another of the same shape."""
    model: LoadedModel
    sampling: ModuleType
    """Their package of samplers."""
    label_B: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        assert self.model.model_config.image_size is not None
        return 4, self.model.model_config.image_size, self.model.model_config.image_size

    def noise(self) -> ImageNoise:
        """That of our images."""
        return ImageNoise(SEED, NUMBERS, self.shape, torch.device("cpu"))

    def ours(self, **settings: Any) -> Tensor:
        config = SamplerConfig(seed=SEED, cfg_channels=CHANNELS, **settings)
        return generate_float(self.model, self.label_B, NUMBERS, config, batch=len(NUMBERS)).image_NCHW

    def doubled(self, cfg_scale: float) -> dict[str, Any]:
        """What their guided network is given beside the images."""
        null_B = torch.full_like(self.label_B, self.model.model_config.num_classes or 0)
        return {"y": torch.cat((self.label_B, null_B)), "cfg_scale": cfg_scale}


def code_of(variable: str) -> Path:
    """The checkout that a variable names; the test is left out without one."""
    given = os.environ.get(variable)
    if not given:
        pytest.skip(f"{variable} is not set; expected the folder of a checkout (docs/coming-from.md)")
    for needed in ("timm", *(("torchdiffeq",) if "SIT" in variable else ())):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"their code imports {needed}, which is not installed; expected it on the PYTHONPATH")
    return Path(given).expanduser()


def imported(path: Path, name: str) -> ModuleType:
    """A file or package of theirs under a name of our own: both have a module `models`."""
    inside = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=inside)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def with_random_weights(network: nn.Module, seed: int) -> nn.Module:
    """No layer without effect: they begin with zeros where a block ends."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name != "pos_embed":
                deviation = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                parameter.normal_(0, deviation, generator=random)
    return network.eval().requires_grad_(False)


def peer_of(
    make: Callable[..., nn.Module], sampling: ModuleType, shape: dict[str, Any], objective: str, folder: Path
) -> Peer:
    """Their network of a shape, and what `ditmoe convert` makes of the file that their training writes of it."""
    build = partial(make, **shape)
    network, other = with_random_weights(build(), 1), with_random_weights(build(), 2)
    state = {"model": other.state_dict(), "ema": network.state_dict()}
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    arguments = argparse.Namespace(model="theirs", num_classes=shape["num_classes"], epochs=1)
    torch.save({**state, "opt": optimiser.state_dict(), "args": arguments}, folder / "0000100.pt")
    options = [f"model.heads={shape['num_heads']}"] if shape["depth"] != 12 else ["--preset", "DiT-S/2"]
    done = run_forked(
        [*DITMOE, "convert", str(folder / "0000100.pt"), str(folder / "run"), *options, "--objective", objective],
        folder / "out",
    )
    assert done.returncode == 0, done.stderr
    labels = torch.tensor([shape["num_classes"] - 1, 3, 3])
    return Peer(network, build, load_model(folder / "run"), sampling, labels)


@pytest.fixture(scope="module", params=SHAPES)
def dit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    code = code_of("DITMOE_DIT_CODE")
    models = imported(code / "models.py", "dit_models")
    diffusion = imported(code / "diffusion" / "__init__.py", "dit_diffusion")
    return peer_of(models.DiT, diffusion, SHAPES[request.param], "ddpm", tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module", params=SHAPES)
def sit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    code = code_of("DITMOE_SIT_CODE")
    models = imported(code / "models.py", "sit_models")
    transport = imported(code / "transport" / "__init__.py", "sit_transport")
    return peer_of(models.SiT, transport, SHAPES[request.param], "sit", tmp_path_factory.mktemp("sit"))


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal to 1e-5 of the largest value; as pictures of that range, equal but for a last bit here and there."""
    largest = expected.abs().max()
    difference = float((found - expected).abs().max() / largest)
    print(f"{what}: {difference:.1e} of {float(largest):.3g}")
    assert found.shape == expected.shape and expected.std() > 0.05 * largest
    assert difference <= TOLERANCE, what
    found_bytes, expected_bytes = (as_bytes(each / largest)[0].int() for each in (found, expected))
    differ = (found_bytes - expected_bytes).abs()
    assert differ.max() <= 1 and (differ > 0).float().mean() < 0.01, what


def guided(network: nn.Module, cfg_scale: float) -> Any:
    """Their network as their scripts call it."""
    return network.forward_with_cfg if cfg_scale != 1 else network.forward


@pytest.fixture
def their_noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Peer, bool], None]]:
    """Gives a program of theirs the noise that our images have at each step, in its batch of both halves."""

    def give(peer: Peer, twice: bool) -> None:
        noise, asked = peer.noise(), iter(range(10**6))

        def next_noise(*_: Any, **__: Any) -> Tensor:
            drawn = noise(next(asked))
            return torch.cat((drawn, drawn)) if twice else drawn

        monkeypatch.setattr(torch, "randn_like", next_noise)
        monkeypatch.setattr(torch, "randn", next_noise)

    yield give
    monkeypatch.undo()


def test_dit_gives_the_same_output(dit: Peer) -> None:
    x_BCHW = dit.noise().initial()
    for t in (0.0, 1.0, 37.0, 500.5, 999.0):
        t_B = torch.tensor([t, 999 - t, t / 2])
        expected = dit.network(x_BCHW, t_B, dit.label_B)
        with torch.no_grad():
            assert_same(dit.model.network(x_BCHW, t_B, dit.label_B), expected, f"output at t = {t:g}")


@pytest.mark.parametrize(("cfg_scale", "steps"), [(1.0, 20), (4.0, 20), (1.5, 250)])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_dit_draws_the_same_images(
    dit: Peer, their_noise: Callable[[Peer, bool], None], sampler: str, cfg_scale: float, steps: int
) -> None:
    if steps > 20 and dit.model.model_config.depth == 12:
        pytest.skip("250 steps of S/2 take minutes on a CPU; 20 were compared")
    ours = dit.ours(sampler=sampler, steps=steps, cfg_scale=cfg_scale)
    learns = dit.model.model_config.learn_sigma
    diffusion = dit.sampling.create_diffusion(str(steps), learn_sigma=learns, sigma_small=not learns)
    start = dit.noise().initial()
    values = {"y": dit.label_B} if cfg_scale == 1 else dit.doubled(cfg_scale)
    x_BCHW = start if cfg_scale == 1 else torch.cat((start, start))
    their_noise(dit, cfg_scale != 1)
    loop = diffusion.p_sample_loop if sampler == "ddpm" else diffusion.ddim_sample_loop
    network = guided(dit.network, cfg_scale)
    theirs = loop(network, x_BCHW.shape, x_BCHW, clip_denoised=False, model_kwargs=values, device="cpu")
    assert_same(ours, theirs[: len(NUMBERS)], f"{sampler}, {steps} steps, guided by {cfg_scale:g}")


def test_sit_gives_the_same_output(sit: Peer) -> None:
    """SiT(z, t) is −ours(z, 1 − t): ours goes from data at 0 to noise at 1."""
    x_BCHW = sit.noise().initial()
    for t in (0.0, 0.04, 0.5, 0.96, 1.0):
        t_B = torch.tensor([t, 1 - t, t / 2])
        expected = sit.network(x_BCHW, t_B, sit.label_B)
        with torch.no_grad():
            found = sit.model.network(x_BCHW, 1 - t_B, sit.label_B)[:, : expected.shape[1]]
        assert_same(-found, expected, f"output at t = {t:g}")


def theirs_of_sit(peer: Peer, cfg_scale: float, method: str, **settings: Any) -> Tensor:
    """What SiT's sampler draws from our start."""
    sampler = peer.sampling.Sampler(peer.sampling.create_transport())
    draw = getattr(sampler, method)(**settings)
    start = peer.noise().initial()
    x_BCHW = start if cfg_scale == 1 else torch.cat((start, start))
    values = {"y": peer.label_B} if cfg_scale == 1 else peer.doubled(cfg_scale)
    drawn: Tensor = draw(x_BCHW, guided(peer.network, cfg_scale), **values)[-1]
    return drawn[: len(NUMBERS)]


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_sit_draws_the_same_images_by_its_ode(sit: Peer, cfg_scale: float) -> None:
    """Its number of steps counts the times, both ends among them."""
    ours = sit.ours(sampler="euler", steps=24, cfg_scale=cfg_scale)
    theirs = theirs_of_sit(sit, cfg_scale, "sample_ode", sampling_method="euler", num_steps=25)
    assert_same(ours, theirs, f"euler, guided by {cfg_scale:g}")


@pytest.mark.parametrize(
    ("cfg_scale", "settings"),
    [
        (1.0, {}),
        (4.0, {}),
        (1.5, {"diffusion_norm": 0.5, "last_step": "tweedie"}),
        (1.0, {"diffusion_form": "decreasing", "last_step_size": 0.1}),
    ],
)
def test_sit_draws_the_same_images_by_its_sde(
    sit: Peer, their_noise: Callable[[Peer, bool], None], cfg_scale: float, settings: dict[str, Any]
) -> None:
    ours = sit.ours(sampler="sit-sde", steps=30, cfg_scale=cfg_scale, **settings)
    their_noise(sit, cfg_scale != 1)
    named = {"diffusion_form": "sigma"} | settings | {"last_step": settings.get("last_step", "mean").capitalize()}
    theirs = theirs_of_sit(sit, cfg_scale, "sample_sde", num_steps=30, **named)
    assert_same(ours, theirs, f"the SDE, {settings}, guided by {cfg_scale:g}")


def test_a_wrong_network_is_noticed(sit: Peer) -> None:
    """The power of the tests above: one weight of one layer that is off by a thousandth."""
    x_BCHW, t_B = sit.noise().initial(), torch.tensor([0.1, 0.5, 0.9])
    expected = sit.network(x_BCHW, t_B, sit.label_B)
    other = with_random_weights(sit.build(), 1)
    assert torch.equal(other(x_BCHW, t_B, sit.label_B), expected)
    other.get_parameter("blocks.0.attn.qkv.weight").mul_(1.001)
    with pytest.raises(AssertionError):
        assert_same(other(x_BCHW, t_B, sit.label_B), expected, "a wrong network")
