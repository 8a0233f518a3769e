"""From what a network draws to pixels and bytes: single images, and the frames of animations.

Shapes: B images of a batch, F frames.
"""

import torch
from torch import Tensor

from ditmoe.data.shards.images import to_uint8
from ditmoe.sampling.drawing.frames import PacedFilm, stretched
from ditmoe.sampling.network.load import LoadedModel


def developed(
    model: LoadedModel, film: PacedFilm, frames: int, device: torch.device, image_BHWC: Tensor
) -> Tensor:
    """So many frames of each image, the last one the image itself; uint8 `[B, F, H, W, C]` on the CPU."""
    shown = [*as_pictures(model, film.cut()[:-1], device), image_BHWC]
    return stretched(torch.stack(shown, dim=1), frames)


def as_pictures(model: LoadedModel, frames: list[Tensor], device: torch.device) -> list[Tensor]:
    """Frames as uint8 `[B, H, W, C]` on the CPU; of latents each is decoded."""
    if model.vae is None:
        return frames
    return [bytes_on_cpu(pixels_of(model, x0_BCHW.to(device))) for x0_BCHW in frames]


def pixels_of(model: LoadedModel, x_BCHW: Tensor) -> Tensor:
    """What the network draws, as pixels."""
    return x_BCHW if model.vae is None else model.vae.decode(x_BCHW)


def bytes_on_cpu(image_NCHW: Tensor) -> Tensor:
    """As `as_bytes`, on the CPU."""
    return as_bytes(image_NCHW)[0].cpu()


def as_bytes(image_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 `[N, H, W, C]`: −1…1 clipped and rounded to 0…255, or grey; and which of them are finite, `[N]`.

    Both are on the images' device, where a quarter of the bytes leave for the CPU. Each operation rounds once, so
    that every device gives the same bytes.
    """
    image_NCHW = image_NCHW.float()
    finite_N = image_NCHW.isfinite().flatten(1).all(1)
    image_NCHW = torch.where(finite_N[:, None, None, None], image_NCHW, 0.0)
    return to_uint8(image_NCHW).permute(0, 2, 3, 1).contiguous(), finite_N
