"""The objectives: perfect predictions cost nothing, the bound bounds, and draws belong to positions."""

import math
from itertools import accumulate, repeat

import pytest
import torch
from torch import Tensor

from ditmoe.model import randomness
from ditmoe.model.config import EmaConfig, ObjectiveConfig
from ditmoe.model.ema import ema_decay, update_ema
from ditmoe.model.objective import Ddpm, Draws, make_objective
from ditmoe.model.schedule import DdpmSchedule

SHAPE = (2, 4, 4)


def make_draws(timestep: Tensor) -> Draws:
    noise = randomness.normal(0, "noise", range(len(timestep)), SHAPE)
    return Draws(noise, timestep.float(), torch.zeros(len(timestep), dtype=torch.bool))


def test_flow_predicts_noise_minus_image() -> None:
    x_BCHW, draws = torch.rand(3, *SHAPE), make_draws(torch.tensor([0.1, 0.5, 0.9]))
    seen = []

    def perfect(z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append((z, t))
        return torch.cat((draws.noise_BCHW - x_BCHW, torch.full_like(z, 9.0)), dim=1)  # second half unused

    loss = make_objective(ObjectiveConfig(kind="rectified_flow")).loss(perfect, x_BCHW, torch.zeros(3), draws)
    assert loss.abs().max() < 1e-10
    torch.testing.assert_close(seen[0][0][1], 0.5 * x_BCHW[1] + 0.5 * draws.noise_BCHW[1])
    assert torch.equal(seen[0][1], draws.timestep_B)


def variance_gradient(share: float, step: int, error: float) -> tuple[float, float]:
    """Loss of one DDPM sample whose ε is off by `error`, and the variance channels' summed gradient."""
    x_BCHW, draws = torch.rand(1, *SHAPE) * 2 - 1, make_draws(torch.tensor([step]))
    variance = torch.full((1, *SHAPE), 2 * share - 1, requires_grad=True)
    epsilon = (draws.noise_BCHW + error).requires_grad_()
    loss = Ddpm().loss(lambda *_: torch.cat((epsilon, variance), dim=1), x_BCHW, torch.zeros(1), draws).sum()
    mse_only = 2 * error / epsilon.numel()
    loss.backward()  # type: ignore[no-untyped-call]
    assert epsilon.grad is not None and variance.grad is not None
    torch.testing.assert_close(epsilon.grad, torch.full_like(epsilon.grad, mse_only))  # the bound is detached
    return loss.item(), variance.grad.sum().item()


def test_ddpm_bound_is_zero_for_the_true_posterior_and_positive_otherwise() -> None:
    perfect, _ = variance_gradient(share=0.0, step=400, error=0.0)  # log β̃ and the true mean: KL = 0
    assert perfect == pytest.approx(0, abs=1e-6)
    wider, gradient = variance_gradient(share=1.0, step=400, error=0.0)
    assert wider > 0 and gradient > 0, "a wider variance than the posterior's costs"


def test_ddpm_bound_at_step_0_is_the_likelihood_of_a_pixel() -> None:
    """A certain prediction of the right 8-bit value costs nothing; bits per dim otherwise."""
    objective, draws = Ddpm(), make_draws(torch.zeros(1))
    x_BCHW = torch.randint(1, 255, (1, *SHAPE)) / 127.5 - 1
    network = lambda *_: torch.cat((draws.noise_BCHW, -torch.ones(1, *SHAPE)), dim=1)  # noqa: E731
    bits = objective.loss(network, x_BCHW, torch.zeros(1), draws).item()
    deviation = DdpmSchedule.linear().posterior_log_variance_clipped[0].mul(0.5).exp().item()
    inside = math.erf(1 / 255 / deviation / math.sqrt(2))
    assert bits == pytest.approx(-math.log2(inside), rel=1e-3)


def in_float64(x: Tensor, draws: Draws, epsilon: Tensor, share: Tensor, step: int) -> tuple[Tensor, float]:
    """x_t, and KL(q ‖ p) plus the mean squared error of ε, from the definitions, in float64 throughout."""
    betas = [1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(1000)]
    before = math.prod(1 - beta for beta in betas[:step])
    beta, after = betas[step], before * (1 - betas[step])
    x, noise, epsilon, share = x.double(), draws.noise_BCHW.double(), epsilon.double(), share.double()
    noisy = math.sqrt(after) * x + math.sqrt(1 - after) * noise
    true_variance = beta * (1 - before) / (1 - after)
    log_variance = share * math.log(beta) + (1 - share) * math.log(true_variance)
    predicted = (noisy - math.sqrt(1 - after) * epsilon) / math.sqrt(after)
    apart = (
        math.sqrt(before) * beta / (1 - after) * (predicted - x)
    )  # of the means: that of x_t is the same in both
    nats = 0.5 * (log_variance - math.log(true_variance) - 1)
    nats = nats + 0.5 * (true_variance + apart.square()) * (-log_variance).exp()
    return noisy, (nats.mean() / math.log(2) + (epsilon - noise).square().mean()).item()


@pytest.mark.parametrize("step", [1, 2, 10, 100, 999])
def test_ddpm_loses_no_digits_at_the_first_steps(step: int) -> None:
    """1 − ᾱ is 2e-4 at step 1: of a float32 ᾱ, three digits of it are left, and the loss is off by 4e-5."""
    generator = torch.Generator().manual_seed(step)
    x_BCHW = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    draws = Draws(
        torch.randn(x_BCHW.shape, generator=generator), torch.tensor([float(step)]), torch.tensor([False])
    )
    epsilon = draws.noise_BCHW + 0.5 * torch.randn(x_BCHW.shape, generator=generator)
    share = torch.rand(x_BCHW.shape, generator=generator)
    noisy, expected = in_float64(x_BCHW, draws, epsilon, share, step)
    objective = Ddpm()
    torch.testing.assert_close(objective.noised(x_BCHW, draws).double(), noisy, rtol=2e-7, atol=2e-7)
    loss = objective.loss_of(torch.cat((epsilon, 2 * share - 1), dim=1), x_BCHW, draws).item()
    assert loss == pytest.approx(expected, rel=3e-6)


def published_timesteps(count: int) -> list[int]:
    """The published choice of `count` of 1000 timesteps: positions that a stride is added to, rounded each."""
    stride = 999 / (count - 1) if count > 1 else 1
    return [round(position) for position in accumulate(repeat(stride, count - 1), initial=0.0)]


def test_respacing_is_the_published_one_at_every_count() -> None:
    schedule = DdpmSchedule.linear()
    for count in range(1, 1001):
        assert schedule.respaced(count).timesteps.tolist() == published_timesteps(count), count


def test_schedule() -> None:
    schedule = DdpmSchedule.linear()
    assert schedule.betas[0] == 1e-4 and schedule.betas[-1] == 2e-2 and len(schedule.betas) == 1000
    respaced = schedule.respaced(250)
    assert respaced.timesteps[0] == 0 and respaced.timesteps[-1] == 999
    torch.testing.assert_close(respaced.alphas_bar, schedule.alphas_bar[respaced.timesteps])
    assert torch.equal(schedule.respaced(1000).timesteps, schedule.timesteps)
    assert schedule.posterior_variance[0] == 0
    total = schedule.posterior_mean_x0 * 1 + schedule.posterior_mean_xt * schedule.alphas_bar.sqrt()
    torch.testing.assert_close(total, schedule.alphas_bar_previous.sqrt())  # the mean of q is consistent
    with pytest.raises(ValueError, match="respaced to 1001"):
        schedule.respaced(1001)


@pytest.mark.parametrize("kind", ["ddpm", "rectified_flow"])
def test_draws_belong_to_positions(kind: str) -> None:
    objective = make_objective(ObjectiveConfig(kind=kind))  # type: ignore[arg-type]
    together = objective.draw(3, [5, 6, 7, 2**40], SHAPE, 0.5)
    for row, position in enumerate([5, 6, 7, 2**40]):
        alone = objective.draw(3, [position], SHAPE, 0.5)
        assert torch.equal(alone.noise_BCHW[0], together.noise_BCHW[row])
        assert alone.timestep_B[0] == together.timestep_B[row]
        assert alone.drop_B[0] == together.drop_B[row]
    other = objective.draw(4, [5], SHAPE, 0.5)
    assert not torch.equal(other.noise_BCHW[0], together.noise_BCHW[0])


def test_distributions_of_draws() -> None:
    positions = range(4000)
    flow = make_objective(ObjectiveConfig(kind="rectified_flow")).draw(0, positions, (1, 1, 1), 0.1)
    assert flow.drop_B.float().mean().item() == pytest.approx(0.1, abs=0.02)
    logit = flow.timestep_B.logit()
    assert logit.mean().item() == pytest.approx(0, abs=0.06) and logit.std().item() == pytest.approx(1, abs=0.05)
    assert flow.noise_BCHW.mean().item() == pytest.approx(0, abs=0.06)
    assert abs(torch.corrcoef(torch.stack((flow.noise_BCHW.flatten(), logit)))[0, 1]) < 0.06
    ddpm = Ddpm().draw(0, positions, (1, 1, 1), 0.0)
    assert ddpm.timestep_B.min() >= 0 and ddpm.timestep_B.max() <= 999 and not ddpm.drop_B.any()
    assert ddpm.timestep_B.mean().item() == pytest.approx(499.5, abs=15)
    assert torch.equal(ddpm.timestep_B, ddpm.timestep_B.floor())


def test_ema() -> None:
    config = EmaConfig(decay=0.99, warmup=True)
    assert ema_decay(config, 1) == pytest.approx(2 / 11)
    assert ema_decay(config, 10**6) == 0.99
    assert ema_decay(EmaConfig(decay=0.5, warmup=False), 1) == 0.5
    average, weights = [torch.zeros(3), torch.ones(2)], [torch.ones(3), torch.zeros(2)]
    update_ema(average, weights, 0.75)
    assert torch.equal(average[0], torch.full((3,), 0.25)) and torch.equal(average[1], torch.full((2,), 0.75))
    update_ema(average, weights, 0.5, torch.tensor(0.0))
    assert torch.equal(average[0], torch.full((3,), 0.25)) and torch.equal(average[1], torch.full((2,), 0.75))
    update_ema(average, weights, 0.5, torch.tensor(1.0))
    assert torch.equal(average[0], torch.full((3,), 0.625)) and torch.equal(average[1], torch.full((2,), 0.375))
