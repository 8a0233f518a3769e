"""The denoiser view of both objectives: exactness, levels, guidance."""

import math

import pytest
import torch
from torch import Tensor

from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.schedule import DdpmSchedule
from ditmoe.sampling.network.denoiser import DdpmDenoiser, FlowDenoiser, make_denoiser
from ditmoe.sampling.settings.config import SamplerConfig

SHAPE = (3, 4, 4)


def data(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, *SHAPE, generator=generator) * 2 - 1, torch.randn(count, *SHAPE, generator=generator)


def test_flow_denoiser_recovers_the_image_of_a_perfect_network():
    sigma = torch.tensor([0.002, 0.1, 1.0, 30.0, 80.0, 2.0**26], dtype=torch.float64)
    x0, noise = data(len(sigma))

    def network(z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        torch.testing.assert_close(t, (sigma / (1 + sigma)).float())
        return torch.cat((noise - x0, torch.full_like(z, 9.0)), dim=1)  # the second half is not used

    x = x0 + sigma.float().view(-1, 1, 1, 1) * noise
    denoised = FlowDenoiser(network, 10).denoise(x, sigma, torch.zeros(len(sigma), dtype=torch.int64))
    torch.testing.assert_close(denoised.x0_BCHW, x0, rtol=0, atol=2e-6)
    assert denoised.variance_share_BCHW is None


def test_flow_prior_is_t_1_to_the_last_bit():
    _, noise = data(2)
    seen = {}

    def network(z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.update(z=z, t=t)
        return z

    denoiser = FlowDenoiser(network, 10)
    sigma = torch.full((2,), denoiser.sigma_prior, dtype=torch.float64)
    denoiser(noise * denoiser.sigma_prior, sigma, torch.tensor([0, 1]))
    assert torch.equal(seen["t"], torch.ones(2)) and torch.equal(seen["z"], noise)


def test_ddpm_denoiser_recovers_the_image_of_a_perfect_network():
    schedule = DdpmSchedule.linear()
    timestep = torch.tensor([0, 1, 17, 500, 998, 999])
    alpha_bar = schedule.alphas_bar[timestep]
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    x0, noise = data(len(sigma))

    def network(x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        assert torch.equal(t, timestep.float())
        mixed = alpha_bar.sqrt().view(-1, 1, 1, 1) * x0 + (1 - alpha_bar).sqrt().view(-1, 1, 1, 1) * noise
        torch.testing.assert_close(x_t, mixed.float(), rtol=1e-6, atol=1e-6)
        return torch.cat((noise, torch.full_like(noise, 0.5)), dim=1)

    x = x0 + sigma.float().view(-1, 1, 1, 1) * noise
    denoised = DdpmDenoiser(network, 10).denoise(x, sigma, torch.zeros(len(sigma), dtype=torch.int64))
    # float32 x of size σ keeps x0 to σ·1e-7
    torch.testing.assert_close(denoised.x0_BCHW, x0, rtol=0, atol=1e-4)
    assert denoised.variance_share_BCHW is not None
    torch.testing.assert_close(denoised.variance_share_BCHW, torch.full_like(noise, 0.75))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ddpm_levels_map_to_their_timesteps(dtype):
    denoiser = DdpmDenoiser(lambda x, t, label: x, 10)
    sigma = denoiser.sigma_of(torch.arange(1000))
    assert torch.equal(denoiser.timestep_of(sigma.to(dtype)), torch.arange(1000).double())
    between = (sigma[10] * sigma[11]).sqrt()
    assert denoiser.timestep_of(between).item() == pytest.approx(10.5)
    assert denoiser.sigma_of(torch.tensor(10.5)).item() == pytest.approx(between.item())
    beyond = torch.tensor([1e-6, 1e6], dtype=dtype)
    assert denoiser.timestep_of(beyond).tolist() == [0.0, 999.0]
    assert denoiser.sigma_min == pytest.approx(0.01, rel=1e-3) and denoiser.sigma_max == pytest.approx(
        157.4, rel=1e-3
    )


def test_ddpm_nearest_timestep():
    seen: list[float] = []

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return x

    sigma = DdpmDenoiser(network, 10).sigma_of(torch.tensor([10.3, 10.7]))
    for mode in ("interpolate", "nearest"):
        DdpmDenoiser(network, 10, timestep=mode)(torch.zeros(2, *SHAPE), sigma, torch.zeros(2, dtype=torch.int64))
    assert seen == pytest.approx([10.3, 10.7, 10.0, 11.0], abs=1e-5)


def test_ddpm_levels_are_the_respaced_schedule_at_every_count():
    denoiser, schedule = DdpmDenoiser(lambda x, t, label: x, 10), DdpmSchedule.linear()
    start = torch.tensor([denoiser.sigma_prior], dtype=torch.float64)
    for steps in range(2, 1001):
        levels = denoiser.own_schedule(start, steps)[0]
        timesteps = denoiser.timestep_of(levels[:-1])
        assert torch.equal(timesteps, schedule.respaced(steps).timesteps.flip(0).double()), steps
        assert levels[-1] == 0
    assert denoiser.own_schedule(start, 1)[0].tolist() == [denoiser.sigma_prior, 0]


def test_ddpm_levels_from_a_low_sigma_do_not_rise():
    denoiser = DdpmDenoiser(lambda x, t, label: x, 10)
    sigma = torch.tensor([157.0, 0.3, 0.02, 0.003], dtype=torch.float64)
    levels = denoiser.own_schedule(sigma, 40)
    assert torch.equal(levels[:, 0], sigma) and (levels.diff(dim=1) <= 0).all() and (levels[:, :-1] > 0).all()


def test_pure_noise_is_shown_to_the_network_as_it_is():
    """As x_T = ε of the published sampler: σ_T·ε is smaller by 2e-5, and would be on every image."""
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    for make in (DdpmDenoiser, FlowDenoiser):
        denoiser = make(network, 10)
        sigma = torch.full((2,), denoiser.sigma_prior, dtype=torch.float64)
        denoiser(noise * denoiser.prior_deviation, sigma, torch.tensor([0, 1]))
        torch.testing.assert_close(seen[-1], noise, rtol=2e-8, atol=0)


class CountedCopies(torch.overrides.TorchFunctionMode):
    """Counts what goes to another device."""

    copies = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is Tensor.to and isinstance(args[0], Tensor) and result.device != args[0].device:
            self.copies += 1
        return result


def test_ddpm_tables_go_to_a_device_once():
    denoiser = DdpmDenoiser(lambda x, t, label: x, 10)
    x, sigma = (torch.zeros(shape, device="meta") for shape in ((2, *SHAPE), (2,)))
    with CountedCopies() as counted:
        for _ in range(5):
            denoiser(x, sigma, torch.zeros(2, dtype=torch.int64, device="meta"))
            denoiser.sigma_of(sigma)
    assert counted.copies == 2


def guided(kind: str, scale: float, channels: int | None):
    """A denoiser of a network whose ε (or v) is its label + channel number, and the batch sizes it saw."""
    batches: list[int] = []

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        batches.append(len(x))
        number = torch.arange(6.0).view(1, 6, 1, 1)
        return label.view(-1, 1, 1, 1) + number.expand(len(x), 6, 4, 4)

    make = DdpmDenoiser if kind == "ddpm" else FlowDenoiser
    return make(network, 10, cfg_scale=scale, cfg_channels=channels), batches


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
@pytest.mark.parametrize(("scale", "channels"), [(1.0, None), (1.0, 1), (4.0, None), (4.0, 1), (0.0, None)])
def test_guidance(kind, scale, channels):
    denoiser, batches = guided(kind, scale, channels)
    sigma = torch.tensor([1.0, 3.0], dtype=torch.float64)
    label = torch.tensor([2, 7])
    denoised = denoiser.denoise(torch.zeros(2, *SHAPE), sigma, label)
    factor = -(sigma if kind == "ddpm" else sigma / (1 + sigma)).view(2, 1, 1, 1)
    prediction = denoised.x0_BCHW.double() / factor
    for channel in range(3):
        strength = scale if channels is None or channel < channels else 1.0
        expected = 10 + strength * (label - 10) + channel
        torch.testing.assert_close(prediction[:, channel, 0, 0], expected.double(), rtol=1e-6, atol=1e-6)
    if kind == "ddpm":  # the variance is the class's own
        torch.testing.assert_close(denoised.variance_share_BCHW[:, 0, 0, 0], (label + 3 + 1) / 2)
    assert batches == ([2] if scale == 1 else [4])
    assert (denoiser.nfe, denoiser.network_evaluations) == (1, 1 if scale == 1 else 2)


def model(**changes) -> ModelConfig:
    shape = {"depth": 1, "hidden": 8, "heads": 1, "patch": 2, "image_size": 4, "channels": 3, "num_classes": 10}
    return ModelConfig(**(shape | changes))


def test_make_denoiser():
    sampler = SamplerConfig(cfg_scale=2, cfg_channels=3)
    made = make_denoiser(lambda x, t, label: x, model(), ObjectiveConfig(kind="ddpm"), sampler)
    assert isinstance(made, DdpmDenoiser)
    made = make_denoiser(lambda x, t, label: x, model(), ObjectiveConfig(kind="rectified_flow"), sampler)
    assert isinstance(made, FlowDenoiser) and made.sigma_max / (1 + made.sigma_max) == pytest.approx(80 / 81)
    assert math.log2(made.sigma_prior) == 26


def test_make_denoiser_refuses_guidance_that_does_not_fit():
    objective = ObjectiveConfig()
    with pytest.raises(UserError, match=r"cfg_channels = 4.*3 channels"):
        make_denoiser(lambda x, t, label: x, model(), objective, SamplerConfig(cfg_channels=4))
    with pytest.raises(UserError, match=r"cfg_scale = 1\.5.*label_dropout = 0"):
        make_denoiser(lambda x, t, label: x, model(label_dropout=0), objective, SamplerConfig(cfg_scale=1.5))
