"""Frames of the denoising: one for each noise level, the last one the image; and seeds of single images."""

import numpy as np
import pytest
import torch

from ditmoe.sampling.drawing.frames import Film, PacedFilm, frame_numbers, stretched
from ditmoe.sampling.drawing.generate import generate
from ditmoe.sampling.network.load import LoadedModel
from ditmoe.sampling.settings.config import SamplerConfig


@pytest.fixture(scope="module", params=["rectified_flow", "ddpm"])
def model(request, lively_model) -> LoadedModel:
    return lively_model(request.param)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "heun", "kar2", "reverse-diffusion", "dpm-solver++"])
def test_there_is_a_frame_for_each_step_and_the_last_is_the_image(model, sampler):
    corrected = {"corrector_steps": 2} if sampler == "reverse-diffusion" else {}
    config = SamplerConfig(sampler=sampler, steps=5, **corrected)
    plain = generate(model, None, range(5), config, batch=2)
    seen = []
    filmed = generate(model, None, range(5), config, batch=2, frames=9, on_evaluation=seen.append)
    assert plain.frames_NFHWC is None and filmed.frames_NFHWC.shape == (5, 5, 8, 8, 1)
    assert torch.equal(filmed.image_NHWC, plain.image_NHWC) and torch.equal(filmed.nfe_N, plain.nfe_N)
    assert torch.equal(filmed.frames_NFHWC[:, -1], filmed.image_NHWC)
    assert not torch.equal(filmed.frames_NFHWC[:, 0], filmed.frames_NFHWC[:, -1])
    assert sum(seen) == 6 * plain.nfe  # three batches of two
    some = generate(model, None, range(5), config, batch=2, frames=3).frames_NFHWC
    assert torch.equal(some, filmed.frames_NFHWC[:, [0, 2, 4]])


def test_an_estimate_at_a_level_that_was_reached_stands_for_the_ones_before():
    film = Film(4, 4, as_it_is)
    for sigma, value in ((9, 0), (5, 1), (5, 2), (6, 3), (2, 4), (2, 5)):
        film.see(torch.full((2,), float(sigma)), torch.full((2, 1), float(value)))
    assert [frame[0].item() for frame in film.cut()] == [0, 3, 5]
    film.see(torch.full((2,), 9.0), torch.full((2, 1), 7.0))  # the next batch
    assert [frame[0].item() for frame in film.cut()] == [7]


def test_each_image_has_all_its_own_steps_spread_over_the_film():
    film = PacedFilm(3, 9, as_it_is)
    film.see(torch.ones(3), torch.zeros(3, 1))
    for step, rows in enumerate(([0, 1, 2], [0, 2], [0], [0]), start=1):
        taken_B = torch.zeros(3, dtype=torch.bool)
        taken_B[rows] = True
        film.take(taken_B, torch.full((3, 1), float(step)))
    shown = torch.stack(film.cut(), dim=1)[:, :, 0]
    assert shown.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 1], [0, 0, 1, 2, 2]]
    assert stretched(shown, 10)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    film.see(torch.ones(3), torch.full((3, 1), 7.0))  # the next batch
    assert [frame[:, 0].tolist() for frame in film.cut()] == [[7, 7, 7]]


def test_frames_of_rk45_are_the_steps_that_it_took(model, monkeypatch):
    config = SamplerConfig(sampler="rk45", tolerance=1e-2)
    plain = generate(model, None, range(5), config, batch=2)
    taken = []

    class Counted(PacedFilm):
        def take(self, taken_B, x0_BCHW):
            taken.append(taken_B.clone())
            super().take(taken_B, x0_BCHW)

    monkeypatch.setattr("ditmoe.sampling.drawing.generate.PacedFilm", Counted)
    seen = []
    filmed = generate(model, None, range(5), config, batch=2, frames=7, on_evaluation=seen.append)
    assert torch.equal(filmed.image_NHWC, plain.image_NHWC) and torch.equal(filmed.nfe_N, plain.nfe_N)
    assert filmed.frames_NFHWC.shape == (5, 7, 8, 8, 1)
    assert torch.equal(filmed.frames_NFHWC[:, -1], filmed.image_NHWC)
    assert not torch.equal(filmed.frames_NFHWC[:, 0], filmed.frames_NFHWC[:, -1])
    # The start, and the attempts that were taken; each attempt is six evaluations, and two begin.
    steps = sum(int(each.sum()) for each in taken)
    assert 6 < steps <= int((1 + (torch.cat([filmed.nfe_N, filmed.nfe_N[-1:]]) - 2) // 6).sum())
    assert sum(seen) >= 2 * 6 + 6 * (steps - 6)


def as_it_is(x):
    return x


def test_frames_are_spread_over_the_steps():
    assert frame_numbers(5, 9) == frame_numbers(5, 5) == [0, 1, 2, 3, 4]
    assert frame_numbers(50, 1) == [49]
    for steps, frames in ((50, 12), (7, 3), (1000, 48)):
        numbers = frame_numbers(steps, frames)
        assert len(set(numbers)) == frames and (numbers[0], numbers[-1]) == (0, steps - 1)
        assert max(np.diff(numbers)) - min(np.diff(numbers)) <= 1


def test_an_image_with_a_seed_of_its_own_is_that_of_the_seed_alone(model):
    config = SamplerConfig(sampler="euler-maruyama", steps=6, schedule="own")
    labels = torch.tensor([1, 2, 1, 4, 0])
    mixed = generate(model, labels, [0, 0, 3, 0, 0], config, batch=4, seeds=[7, 8, 7, 2**62, 7])
    for place, (seed, number) in enumerate(((7, 0), (8, 0), (7, 3), (2**62, 0), (7, 0))):
        of_seed = config.model_copy(update={"seed": seed})
        alone = generate(model, labels[place : place + 1], [number], of_seed, batch=4)
        assert torch.equal(alone.image_NHWC[0], mixed.image_NHWC[place])
