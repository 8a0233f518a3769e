"""Images from a loaded model: image i is a function of (seed, i) and its label alone.

All its noise comes from streams keyed by (seed, image number, step), so that neither the batch size nor who draws
the other images has a say in it beyond rounding. Every batch has the same shape (the last one is filled up),
because a matrix product of another shape may round otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ditmoe.data.images import to_uint8
from ditmoe.model import randomness
from ditmoe.model.errors import UserError
from ditmoe.sampling.config import SamplerConfig
from ditmoe.sampling.denoiser import Denoiser, make_denoiser
from ditmoe.sampling.integrators import Drawn, NoiseSource
from ditmoe.sampling.load import LoadedModel
from ditmoe.sampling.samplers import integrate, starting_sigma


class Generated(NamedTuple):
    """Images before rounding."""

    image_NCHW: Tensor
    """float32 on the CPU, about −1…1, not clipped."""
    nfe_N: Tensor
    """Evaluations of the denoiser that each image took, int64."""
    passes_per_evaluation: int
    """Of an image through the network: two under guidance."""

    @property
    def nfe(self) -> float:
        """Evaluations of the denoiser per image, on average where images differ."""
        return self.nfe_N.double().mean().item()

    @property
    def network_evaluations(self) -> float:
        """Passes through the network per image: twice the NFE under guidance."""
        return self.nfe * self.passes_per_evaluation

    def as_bytes(self) -> Tensor:
        """uint8 `[N, H, W, C]`: −1…1 clipped and rounded to 0…255."""
        return to_uint8(self.image_NCHW).permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class ImageNoise:
    """The noise of some images: their streams hold one stretch for each step."""

    seed: int
    image_numbers: Sequence[int]
    shape: tuple[int, ...]
    """(C, H, W) of one image."""
    device: torch.device

    def initial(self) -> Tensor:
        """What the images start from, standard normal `[B, C, H, W]`."""
        return self._draw("image/start")

    def __call__(self, step: int) -> Tensor:
        """What a stochastic integrator adds at a step, standard normal `[B, C, H, W]`."""
        return self._draw(f"image/step {step}")

    def _draw(self, purpose: str) -> Tensor:
        return randomness.normal(self.seed, purpose, self.image_numbers, self.shape).to(self.device)


def default_labels(image_numbers: Sequence[int], num_classes: int) -> Tensor:
    """The classes in turn: image i is of class i mod `num_classes`; int64 `[N]`."""
    return torch.tensor(image_numbers, dtype=torch.int64) % num_classes


def generate(
    model: LoadedModel,
    labels: Tensor | None,
    image_numbers: Sequence[int],
    config: SamplerConfig,
    batch: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw images as bytes, uint8 `[N, H, W, C]` on the CPU: −1…1 clipped and rounded to 0…255.

    As `generate_float`; UserError also where an image is not finite.
    """
    images = generate_float(model, labels, image_numbers, config, batch, progress)
    check_finite(images.image_NCHW, image_numbers)
    return images.as_bytes()


def generate_float(
    model: LoadedModel,
    labels: Tensor | None,
    image_numbers: Sequence[int],
    config: SamplerConfig,
    batch: int,
    progress: Callable[[int], None] | None = None,
) -> Generated:
    """Draw images on the network's device; what a network of latents draws is decoded.

    Args:
        labels: class of each image, int64 `[N]`; None: `default_labels`.
        image_numbers: the number i of each image.
        config: the sampler; its nulls are filled in for the model's objective.
        batch: images drawn at once. Another size changes an image by rounding only.
        progress: called after each batch with the images drawn so far.

    Raises:
        UserError: a label is not a class of the model, or the sampler does not fit it.
    """
    model_config = model.model_config
    assert model_config.num_classes and model_config.channels and model_config.image_size
    labels = default_labels(image_numbers, model_config.num_classes) if labels is None else labels
    assert len(labels) == len(image_numbers) and batch >= 1
    _check_labels(labels, model_config.num_classes)
    config = config.resolved(model.objective_config)
    network = model.network_in(config.precision)
    denoiser = make_denoiser(network, model_config, model.objective_config, config)
    shape = (model_config.channels, model_config.image_size, model_config.image_size)
    device = next(network.parameters()).device
    images: list[Tensor] = []
    nfe: list[Tensor] = []
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            for first in range(0, len(image_numbers), batch):
                wanted = list(range(first, min(first + batch, len(image_numbers))))
                rows = wanted + [wanted[-1]] * (batch - len(wanted))
                noise = ImageNoise(config.seed, [image_numbers[row] for row in rows], shape, device)
                drawn = draw(denoiser, labels[rows].to(device), noise.initial(), noise, config)
                pixels_BCHW = drawn.x_BCHW if model.vae is None else model.vae.decode(drawn.x_BCHW)
                images.append(pixels_BCHW[: len(wanted)].float().cpu())
                nfe_B = torch.full((len(rows),), drawn.nfe) if drawn.nfe_B is None else drawn.nfe_B.cpu()
                nfe.append(nfe_B[: len(wanted)])
                if progress is not None:
                    progress(wanted[-1] + 1)
    finally:
        network.train(training)
    if not images:
        return Generated(torch.empty(0, *model.image_shape), torch.empty(0, dtype=torch.int64), 1)
    return Generated(torch.cat(images), torch.cat(nfe), denoiser.network_evaluations // denoiser.nfe)


def draw(
    denoiser: Denoiser, label_B: Tensor, initial_BCHW: Tensor, noise: NoiseSource, config: SamplerConfig
) -> Drawn:
    """Draw one batch from pure noise with a resolved configuration.

    Args:
        initial_BCHW: standard normal; times σ (`starting_sigma`) it is what the images start from.
    """
    sigma = starting_sigma(denoiser, config)
    sigma_B = torch.full((len(label_B),), sigma, dtype=torch.float64, device=initial_BCHW.device)
    return integrate(denoiser, initial_BCHW * sigma, sigma_B, label_B, noise, config)


def check_finite(image_NCHW: Tensor, image_numbers: Sequence[int]) -> None:
    """UserError naming the first image that has NaN or infinity in it: bytes would not show it."""
    bad = (~image_NCHW.isfinite().flatten(1).all(1)).nonzero()
    if len(bad):
        raise UserError(
            f"image {image_numbers[int(bad[0])]} is not finite, and neither are {len(bad) - 1} others: "
            "guidance, or the weights, are beyond what the precision holds; try a smaller cfg_scale, or fp32"
        )


def _check_labels(labels: Tensor, num_classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(f"class {int(wrong[0])}: expected 0 to {num_classes - 1}")
