"""How images come to the size that a feature network takes. It changes FID, so its name stands beside each figure.

Shapes: N images, C channels, H×W pixels.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

BY_THE_FILE: Final = "by the file"
"""Of a TorchScript file, which resizes as TensorFlow did."""


def half_pixel_bilinear(image_NCHW: Tensor, size: int) -> Tensor:
    """Bilinear with half-pixel centres and no antialiasing, as pytorch-fid resizes: values 0 … 1 → −1 … 1."""
    x_NCHW = functional.interpolate(
        image_NCHW.float() / 255, size=(size, size), mode="bilinear", align_corners=False
    )
    return 2 * x_NCHW - 1


def tensorflow_bilinear(image_NCHW: Tensor, size: int) -> Tensor:
    """Bilinear as TensorFlow 1 resizes, which FID was published with: values 0 … 255 → (x − 128) / 128.

    Pixel i of the result lies at i · H/size of the source, with no half-pixel centres and no antialiasing; beyond
    the last pixel the last one is repeated.
    """
    x_NCHW = image_NCHW.float()
    for dim in (3, 2):
        x_NCHW = _between(x_NCHW, size, dim)
    return (x_NCHW - 128) / 128


def _between(x_NCHW: Tensor, size: int, dim: int) -> Tensor:
    """Linear between neighbours along one dimension."""
    length = x_NCHW.shape[dim]
    # In float32, as there.
    place_S = (
        torch.arange(size, dtype=torch.float32, device=x_NCHW.device)
        * (torch.tensor(length, dtype=torch.float32) / size).item()
    )
    low_S = place_S.floor().long()
    share_S = place_S - low_S
    high_S = (low_S + 1).clamp(max=length - 1)
    share = share_S.reshape([-1 if axis == dim else 1 for axis in range(4)])
    low_NCHW = x_NCHW.index_select(dim, low_S)
    return low_NCHW + (x_NCHW.index_select(dim, high_S) - low_NCHW) * share


def pillow_bicubic(image_NHWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Bicubic with antialiasing, rounded to bytes, as Pillow resizes: uint8 [N, H, W, 3] → [N, size, size, 3]."""
    images = [
        Image.fromarray(image_HWC).resize((size, size), Image.Resampling.BICUBIC) for image_HWC in image_NHWC
    ]
    return np.stack([np.asarray(image) for image in images])
