"""RK45 against scipy's, against the closed form, and when it cannot arrive."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ditmoe.model.errors import UserError
from ditmoe.sampling.integrators import adaptive
from ditmoe.sampling.integrators.adaptive import rk45
from ditmoe.sampling.network.denoiser import Denoised
from tests.sampling.mixture import GaussianMixture, MixtureDenoiser

ONE_GAUSSIAN = GaussianMixture.of([[0.7, 0.7]], [0.5], [1])
TWO_DIMS = GaussianMixture.of([[-1, 0], [1, 0.5], [0, -1]], [0.3, 0.2, 0.4], [1, 2, 3])
SIGMA_MIN = 0.002


def start(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    sigma = torch.tensor([80.0, 20.0, 3.0, 0.4, 0.05, 0.003], dtype=torch.float64)[:count]
    x = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x * (1 + sigma.view(-1, 1, 1, 1)), sigma, torch.zeros(count, dtype=torch.int64)


def of_scipy(mixture: GaussianMixture, x: Tensor, sigma: float, tolerance: float) -> tuple[np.ndarray, int]:
    """The flow of one image from σ to the smallest σ by scipy, in log σ, and the evaluations that it took."""

    def slope(at: float, flat: np.ndarray) -> np.ndarray:
        x_BD, at_B = torch.from_numpy(flat)[None], torch.tensor([math.exp(at)], dtype=torch.float64)
        return (x_BD - mixture.denoise(x_BD, at_B))[0].numpy()

    span = (math.log(sigma), math.log(SIGMA_MIN))
    solved = solve_ivp(slope, span, x.flatten().numpy(), method="RK45", rtol=tolerance, atol=tolerance)
    return solved.y[:, -1], solved.nfev


def test_steps_in_log_sigma_are_half_as_many_as_in_sigma():
    """In 768 dims from the published range of σ, in units of −1…1: 128 evaluations, where steps in σ take 224."""
    random = torch.Generator().manual_seed(0)
    means_KD = 0.5 * torch.randn(20, 768, generator=random, dtype=torch.float64)
    mixture = GaussianMixture(means_KD, torch.full((20,), 0.02).double(), torch.full((20,), 1 / 20).double())
    x = 100 * torch.randn(1, 3, 16, 16, generator=random, dtype=torch.float64)
    sigma, label = torch.tensor([100.0], dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    drawn = rk45(MixtureDenoiser(mixture, sigma_min=0.02, sigma_max=100.0), x, sigma, label)

    def slope(at: float, flat: np.ndarray) -> np.ndarray:
        x_BD, at_B = torch.from_numpy(flat)[None], torch.tensor([at], dtype=torch.float64)
        return ((x_BD - mixture.denoise(x_BD, at_B)) / at)[0].numpy()

    along_sigma = solve_ivp(slope, (100.0, 0.02), x.flatten().numpy(), method="RK45", rtol=1e-5, atol=1e-5)
    assert drawn.nfe / along_sigma.nfev == pytest.approx(111 / 193, rel=0.1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("mixture", [ONE_GAUSSIAN, TWO_DIMS], ids=["Gaussian", "mixture"])
def test_each_image_takes_the_steps_that_scipy_takes_for_it_alone(mixture, tolerance):
    x, sigma, label = start()
    drawn = rk45(MixtureDenoiser(mixture, sigma_min=SIGMA_MIN), x, sigma, label, tolerance=tolerance)
    for image in range(len(x)):
        near, evaluations = of_scipy(mixture, x[image], sigma[image].item(), tolerance)
        x_BD, at_B = torch.from_numpy(near)[None], torch.tensor([SIGMA_MIN], dtype=torch.float64)
        expected = mixture.denoise(x_BD, at_B)[0]  # the step to σ = 0
        torch.testing.assert_close(drawn.x_BCHW[image].flatten(), expected, rtol=1e-9, atol=1e-9)
        # Where one step goes all the way, scipy's may end a rounding error before it, and another follows.
        assert drawn.nfe_B[image] == evaluations or (drawn.nfe_B[image] == 8 and evaluations == 14)
    assert len(set(drawn.nfe_B.tolist())) > 3  # they do differ


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_error_is_of_the_size_of_the_tolerance(tolerance):
    x, sigma, label = start()
    wide = (0.25 + sigma.square()).sqrt().view(-1, 1, 1, 1)
    exact = 0.7 + (x - 0.7) * 0.5 / wide
    drawn = rk45(MixtureDenoiser(ONE_GAUSSIAN, sigma_min=1e-4), x, sigma, label, tolerance=tolerance)
    assert (drawn.x_BCHW - exact).abs().max() < 50 * tolerance  # of |x| up to 200 at the start


def test_evaluations_of_an_image_are_those_the_denoiser_counts_for_it_alone():
    x, sigma, label = start()
    sigma[-1] = 0.001  # below the smallest: D at once
    together = rk45(MixtureDenoiser(TWO_DIMS), x, sigma, label)
    for image in range(len(x)):
        one, denoiser = slice(image, image + 1), MixtureDenoiser(TWO_DIMS)
        alone = rk45(denoiser, x[one], sigma[one], label[one])
        assert alone.nfe == denoiser.nfe == alone.nfe_B[0] == together.nfe_B[image]
    assert together.nfe == together.nfe_B.max() and together.nfe_B[-1] == 1
    at_once = TWO_DIMS.denoise(x[-1:].flatten(1), sigma[-1:])
    torch.testing.assert_close(together.x_BCHW[-1:].flatten(1), at_once, rtol=1e-12, atol=1e-12)


class FaultyDenoiser(MixtureDenoiser):
    """As a network in a coarse precision, and one that leaves the numbers for images on the right."""

    def __init__(self, noise: float | None) -> None:
        super().__init__(TWO_DIMS)
        self.noise = noise

    def denoise(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Denoised:
        x0_BCHW = super().denoise(x_BCHW, sigma_B, label_B).x0_BCHW
        if self.noise is not None:
            return Denoised(x0_BCHW + self.noise * torch.sin(1e6 * x_BCHW), None)
        return Denoised(torch.where(label_B.view(-1, 1, 1, 1) == 1, math.nan, x0_BCHW), None)


def test_a_tolerance_beyond_the_precision_is_an_error(monkeypatch):
    monkeypatch.setattr(adaptive, "MOST_ATTEMPTS", 100)
    x, sigma, label = start()
    with pytest.raises(UserError, match=r"after 100 steps an image is still at sigma = .*tolerance = 1e-05"):
        rk45(FaultyDenoiser(0.01), x, sigma, label)


def test_an_image_that_is_not_finite_ends_and_holds_up_no_other():
    x, sigma, label = start(4)
    label[1] = 1
    drawn = rk45(FaultyDenoiser(None), x, sigma, label)
    assert drawn.x_BCHW[1].isnan().all()
    good = [0, 2, 3]
    expected = rk45(MixtureDenoiser(TWO_DIMS), x[good], sigma[good], label[good])
    torch.testing.assert_close(drawn.x_BCHW[good], expected.x_BCHW)
