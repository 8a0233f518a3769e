"""SiT's weights, whose time runs the other way, against a plain program of the paper's equations.

SiT's own code is not at hand, for its licence is non-commercial. What it computes is written down here from the
paper (Ma et al., arXiv 2401.08740, linear path, velocity): z = t·x + (1 − t)·ε, v = x − ε, and dz/dt = v from
t = 0 to 1.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from ditmoe.launcher.commands.convert import command as convert
from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.initialise import initialise
from ditmoe.model.weights.probe import is_sit
from ditmoe.parallel.checkpoint.folder import read_info
from ditmoe.parallel.start.source import Start, opened
from ditmoe.sampling.drawing.generate import generate_float
from ditmoe.sampling.drawing.noise import ImageNoise
from ditmoe.sampling.integrators.samplers import integrate, start_of
from ditmoe.sampling.network.denoiser import FlowDenoiser
from ditmoe.sampling.network.load import load_model
from ditmoe.sampling.settings.config import SamplerConfig

Kind = Literal["ddpm", "rectified_flow", "sit"]
MODEL = ModelConfig(
    depth=1,
    hidden=32,
    heads=2,
    patch=2,
    experts=0,
    image_size=8,
    channels=1,
    num_classes=10,
    learn_sigma=False,
)
STEPS = 100


def noised(
    kind: Kind, x_BCHW: Tensor, noise_BCHW: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """What a network is shown, at which timestep, and what it should say."""
    count = len(x_BCHW)
    if kind == "ddpm":
        t_B = torch.randint(1000, (count,), generator=random)
        alpha = (1 - torch.linspace(1e-4, 2e-2, 1000)).cumprod(0)[t_B].view(-1, 1, 1, 1)
        return alpha.sqrt() * x_BCHW + (1 - alpha).sqrt() * noise_BCHW, t_B.float(), noise_BCHW
    t_B = torch.rand(count, generator=random)
    t = t_B.view(-1, 1, 1, 1)
    if kind == "sit":
        return t * x_BCHW + (1 - t) * noise_BCHW, t_B, x_BCHW - noise_BCHW
    return (1 - t) * x_BCHW + t * noise_BCHW, t_B, noise_BCHW - x_BCHW


@cache
def trained(kind: Kind) -> DiT:
    """A small network, trained for a moment on handwritten digits."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(load_digits().target)
    network, random = DiT(MODEL), torch.Generator().manual_seed(0)
    initialise(network, seed=0)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (64,), generator=random)
        label_B = labels[chosen].masked_fill(torch.rand(64, generator=random) < 0.1, 10)
        x_BCHW = images[chosen]
        shown, t_B, target = noised(kind, x_BCHW, torch.randn(x_BCHW.shape, generator=random), random)
        loss = (network(shown, t_B, label_B) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.requires_grad_(False)


def save(network: DiT, path: Path) -> Path:
    torch.save({"ema": canonical_state(network)}, path)
    return path


def test_its_ode_draws_the_same_images(tmp_path: Path) -> None:
    """Euler's steps of dz/dt = SiT(z, t) from noise at t = 0, and `ditmoe sample` of the converted weights."""
    network = trained("sit")
    convert(save(network, tmp_path / "sit.pt"), tmp_path / "ours", ["model.heads=2"], objective="sit")
    settings = SamplerConfig(sampler="euler", steps=8, seed=2)
    label_B = torch.tensor([3, 7])
    found = generate_float(load_model(tmp_path / "ours"), label_B, [0, 1], settings, batch=2).image_NCHW
    z_BCHW = ImageNoise(settings.seed, [0, 1], (1, 8, 8), torch.device("cpu")).initial()
    for step in range(settings.steps):
        t_B = torch.full((2,), step / settings.steps)
        z_BCHW = z_BCHW + network(z_BCHW, t_B, label_B) / settings.steps
    assert z_BCHW.std() > 0.2
    torch.testing.assert_close(found, z_BCHW, rtol=0, atol=1e-4)


def test_the_closed_answer_for_gaussian_data() -> None:
    """For data of N(m, s²) its velocity is known, and its ODE leads from ε to m + s·ε; so do our samplers.

    E[x − ε | z] with z = t·x + (1 − t)·ε is m + (t·s² − (1 − t))/(t²·s² + (1 − t)²)·(z − t·m).
    """
    mean, deviation = 0.7, 0.3

    def sit(z: Tensor, t_B: Tensor) -> Tensor:
        t = t_B.view(-1, 1, 1, 1).double()
        slope = (t * deviation**2 - (1 - t)) / (t**2 * deviation**2 + (1 - t) ** 2)
        return (mean + slope * (z - t * mean)).float()

    def ours(z: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        return -sit(z, 1 - t_B)  # what converted weights compute

    denoiser = FlowDenoiser(ours, null_label=1)
    noise_BCHW = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    label_B = torch.zeros(4, dtype=torch.int64)
    for name, tolerance in (("euler", 2e-3), ("heun", 1e-2), ("dpm-solver++", 1e-2)):
        config = SamplerConfig(sampler=name, steps=1000 if name == "euler" else 100)  # type: ignore[arg-type]
        config = config.resolved(ObjectiveConfig())
        start = start_of(denoiser, config)
        sigma_B = torch.full((4,), start.sigma, dtype=torch.float64)
        begin = noise_BCHW * start.deviation + (0 if name == "euler" else mean)
        drawn = integrate(denoiser, begin, sigma_B, label_B, lambda step: noise_BCHW, config)
        torch.testing.assert_close(drawn.x_BCHW, mean + deviation * noise_BCHW, rtol=0, atol=tolerance)


KINDS: tuple[Kind, ...] = ("ddpm", "rectified_flow", "sit")


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_guess_is_refused(tmp_path: Path, kind: Kind) -> None:
    """Of weights that were trained, SiT's are told from the others, and `--trust-objective` is believed."""
    path = save(trained(kind), tmp_path / "weights.pt")
    said: dict[Kind, dict[str, Any]] = {
        "ddpm": {"objective": "ddpm"},
        "rectified_flow": {"objective": "rectified_flow", "not_sit": True},
        "sit": {"objective": "sit"},
    }
    for guess, options in said.items():
        out = tmp_path / guess
        start = Start(path, "ema", guess, MODEL, ObjectiveConfig())
        if (guess == "sit") == (kind == "sit"):
            convert(path, out, ["model.heads=2"], **options)
            with opened(start):
                pass
        else:
            with pytest.raises(UserError, match=r"answer to noise .*--trust-objective takes your word for it"):
                convert(path, out, ["model.heads=2"], **options)
            assert not out.exists()
            message = r"train\.start_objective: .* answer to noise"
            with pytest.raises(UserError, match=message), opened(start):
                pass
            convert(path, out, ["model.heads=2"], **options, trust_objective=True)
        assert read_info(out).objective.kind == ("ddpm" if guess == "ddpm" else "rectified_flow")


def test_weights_that_were_not_trained_say_nothing() -> None:
    network = DiT(MODEL)
    initialise(network, seed=0)
    assert is_sit(canonical_state(network), MODEL) is None
    for seed in range(5):
        for deviation in (0.02, 0.2, 1.0):
            random = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.normal_(0, deviation, generator=random)
            assert is_sit(canonical_state(network), MODEL) is None
    assert math.isclose(2 * (1 - 0.25) / (1 + 0.25), 1.2)  # the slope of data of variance ¼, as the module has it
