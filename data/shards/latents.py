"""Latents in shards: the mean and standard deviation of each image's latent, from which every epoch draws anew.

A view of an image (itself, or its mirror image) is one member, an array `[2, C, H, W]` of the mean and the
standard deviation as the VAE gives them, neither shifted nor scaled. Not the log variance: rounding −20 to the 8
bits of bfloat16 puts the deviation off by 3%, while the deviation itself keeps its own relative precision (0.4%),
and needs no exponential when it is read.

    00000917.moments.npy    or .moments.safetensors, with the one tensor `moments`
    00000917.mirrored.npy   where both views are stored
"""

import io
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from ditmoe.data.shards.decode import BadSample
from ditmoe.data.shards.images import blaming_bytes
from ditmoe.data.shards.index import DatasetIndex, LatentFacts
from ditmoe.model import randomness

LatentFormat = Literal["safetensors", "npy"]
FORMATS: Final[tuple[LatentFormat, ...]] = ("safetensors", "npy")
PLAIN: Final = "moments"
MIRRORED: Final = "mirrored"
TENSOR: Final = "moments"
"""Name of the tensor in a safetensors member."""
LONGEST_HEADER: Final = 1024
"""Bytes; those that are written take about 100."""

_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SAFETENSORS_NAMES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Moments = NDArray[np.float32]
"""float32 `[C, H, W]`."""


class _Header(NamedTuple):
    """What a member says of itself before its numbers."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte at which the numbers begin."""


def encode_latent(
    mean_CHW: Tensor, std_CHW: Tensor, dtype: Literal["float32", "float16", "bfloat16"], format: LatentFormat
) -> bytes:
    """A member's bytes.

    Args:
        mean_CHW, std_CHW: float32 on the CPU.
        dtype: of the numbers that are stored; npy has no bfloat16.

    Raises:
        BadSample: a number is not finite, or too large for the dtype.
    """
    assert format == "safetensors" or dtype != "bfloat16"
    moments = torch.stack([mean_CHW, std_CHW]).to(_DTYPES[dtype])
    if not moments.isfinite().all():
        largest = float(torch.stack([mean_CHW, std_CHW]).abs().max())
        raise BadSample(f"the largest moment is {largest:g}, which {dtype} cannot hold")
    if format == "safetensors":
        return save({TENSOR: moments})
    buffer = io.BytesIO()
    np.save(buffer, moments.numpy(), allow_pickle=False)
    return buffer.getvalue()


def latent_extension(extensions: Iterable[str], index: DatasetIndex, mirrored: bool) -> str:
    """Which of a sample's members holds a view.

    `mirrored` is for an index that has both views. BadSample when the view is missing, or there in both formats.
    """
    assert index.latents is not None and (not mirrored or index.latents.flips == "both")
    present = list(extensions)
    stem = MIRRORED if mirrored else PLAIN
    expected = [f"{stem}.{format}" for format in FORMATS]
    found = [extension for extension in expected if extension in present]
    if len(found) != 1:
        number = "no latent" if not found else f"{len(found)} latents"
        raise BadSample(
            f"{number}: expected one of {', '.join(expected)}, found {', '.join(present) or 'nothing'}"
        )
    return found[0]


def decode_latent(extension: str, data: bytes, index: DatasetIndex) -> tuple[Moments, Moments]:
    """Mean and standard deviation, each float32 `[C, H, W]`, of the size, channels and dtype of the index.

    BadSample when the member is damaged, of another shape or dtype, or has NaN, infinity or a negative deviation;
    the header is judged before any number is read.
    """
    assert index.latents is not None
    with blaming_bytes(BadSample, f"undecodable {extension}"):  # a header is a Python literal or JSON
        header = _parse(data[: _header_length(extension, data)], extension)
    expected = (2, index.channels, index.image_size, index.image_size)
    dtype = index.latents.dtype
    if header.dtype != dtype:
        raise BadSample(f"{extension} of {header.dtype}, expected {dtype}")
    if header.shape != expected:
        raise BadSample(
            f"wrong size or channels: {extension} of shape {list(header.shape)}, expected {list(expected)}"
        )
    bytes_each = 4 if dtype == "float32" else 2
    size = bytes_each * 2 * index.channels * index.image_size**2
    if len(data) - header.start != size:
        raise BadSample(f"{extension} has {len(data) - header.start:,} bytes of numbers, expected {size:,}")
    if dtype == "bfloat16":  # the upper half of a float32
        upper = np.frombuffer(data, "<u2", offset=header.start).astype(np.uint32)
        moments = (upper << 16).view(np.float32)
    else:
        moments = np.frombuffer(data, f"<f{bytes_each}", offset=header.start).astype(np.float32)
    moments = moments.reshape(expected)
    mean_CHW, std_CHW = moments[0], moments[1]
    # Their sum is not finite if one of them is not, and one pass over the numbers is all that there is time for.
    if not np.isfinite(moments.sum()) and not np.isfinite(moments).all():
        raise BadSample(f"{extension} has NaN or infinity in it")
    if std_CHW.min() < 0:
        raise BadSample(f"{extension} has a negative standard deviation, {std_CHW.min():g}")
    return mean_CHW, std_CHW


def draw_latents(
    mean_BCHW: NDArray[np.float32],
    std_BCHW: NDArray[np.float32],
    seed: int,
    positions: Sequence[int],
    latents: LatentFacts,
) -> NDArray[np.float32]:
    """A draw of each latent, as the network sees it: (mean + std · ε − shift) · scale, float32 `[B, C, H, W]`.

    ε is standard normal by (seed, position in the global order), so that each epoch has its own.
    """
    noise_BCHW = randomness.normal(seed, "data/latent", positions, mean_BCHW.shape[1:]).numpy()
    noise_BCHW *= std_BCHW
    noise_BCHW += mean_BCHW
    if latents.shift:
        noise_BCHW -= np.float32(latents.shift)
    noise_BCHW *= np.float32(latents.scale)
    drawn: NDArray[np.float32] = noise_BCHW
    return drawn


def _header_length(extension: str, data: bytes) -> int:
    """Bytes before the numbers. BadSample when no such member begins so."""
    if extension.endswith(".npy"):
        if data[:8] != b"\x93NUMPY\x01\x00":
            raise BadSample(f"undecodable {extension}: does not begin as an npy of version 1")
        length = 10 + int.from_bytes(data[8:10], "little")
    else:
        length = 8 + int.from_bytes(data[:8], "little")
    if length > min(LONGEST_HEADER, len(data)):
        raise BadSample(
            f"undecodable {extension}: its header claims {length:,} bytes of {len(data):,} "
            f"(at most {LONGEST_HEADER:,} expected)"
        )
    return length


@lru_cache(maxsize=64)
def _parse(header: bytes, extension: str) -> _Header:
    """Read a header; those of one dataset are all alike, so it is read once. Any exception where it is damaged."""
    if extension.endswith(".npy"):
        file = io.BytesIO(header)
        npy_format.read_magic(file)
        shape, fortran, numpy_dtype = npy_format.read_array_header_1_0(file)
        if numpy_dtype.hasobject:
            raise BadSample(f"{extension} of Python objects (a pickle), which is never read")
        if fortran or numpy_dtype.byteorder == ">":
            raise BadSample(f"{extension} in Fortran's or the other byte order, expected C's and little-endian")
        return _Header(str(numpy_dtype), tuple(shape), len(header))
    values: dict[str, Any] = json.loads(header[8:])
    names = sorted(name for name in values if name != "__metadata__")
    if names != [TENSOR]:
        raise BadSample(f"{extension} has the tensors {', '.join(names)[:80] or 'none'}, expected {TENSOR} alone")
    tensor = values[TENSOR]
    dtype = str(tensor["dtype"])
    if tensor["data_offsets"][0] != 0:
        raise BadSample(f"{extension} has a tensor that does not begin where its header ends")
    return _Header(_SAFETENSORS_NAMES.get(dtype, dtype), tuple(map(int, tensor["shape"])), len(header))
