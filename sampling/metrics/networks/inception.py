"""The Inception-v3 of 2015-12-05 that FID is defined with, from one of the two files in common use.

The TensorFlow network of Heusel et al. 2017 departs from the published Inception-v3 (Szegedy et al. 2016) in that
average pools leave the padding out of the mean, the last block pools by maximum, and there are 1008 classes. Keys
of the state dict are the usual ones of Inception-v3 in PyTorch (`Conv2d_1a_3x3.conv.weight`, …, `fc.weight`).

Shapes: N images, C channels, H×W cells.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ditmoe.model.errors import UserError
from ditmoe.sampling.metrics.features import Features, fingerprint_of, images_to_tensor
from ditmoe.sampling.metrics.networks.resize import BY_THE_FILE, half_pixel_bilinear, tensorflow_bilinear
from ditmoe.sampling.settings.names import ResizeName

TORCHSCRIPT_FILE: Final = "inception-2015-12-05.pt"
STATE_DICT_FILE: Final = "pt_inception-2015-12-05-6726825d.pth"
FEATURES: Final = 2048
CLASSES: Final = 1008
SPATIAL_CHANNELS: Final = 7
SPATIAL_FEATURES: Final = SPATIAL_CHANNELS * 17 * 17
INPUT_SIZE: Final = 299

HOW_TO_GET: Final = (
    "the Inception weights are a file that you give with --features-path, one of:\n"
    f"  {TORCHSCRIPT_FILE}  (TorchScript, from the metrics of NVIDIA's StyleGAN2-ADA and StyleGAN3)\n"
    f"  {STATE_DICT_FILE}  (state dict, from the releases of mseitzer/pytorch-fid, tag fid_weights)\n"
    "or use --features classifier, which needs no file"
)


class Convolution(nn.Module):
    """Convolution without bias, batch norm (ε = 1e-3), ReLU."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-3)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x_NCHW)))


def _mean_pool(x_NCHW: Tensor) -> Tensor:
    return functional.avg_pool2d(x_NCHW, 3, stride=1, padding=1, count_include_pad=False)


class Block35(nn.Module):
    """35×35: branches 1×1, 5×5, double 3×3, pool."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(channels, 64, 1)
        self.branch5x5_1 = Convolution(channels, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), wide, double, self.branch_pool(_mean_pool(x))], 1)


class Reduction35(nn.Module):
    """35×35 → 17×17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, stride=2)], 1)


class Block17(nn.Module):
    """17×17: branches 1×1, 7×7 and double 7×7 (as 1×7 and 7×1), pool."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        row: dict[str, Any] = {"kernel": (1, 7), "padding": (0, 3)}
        column: dict[str, Any] = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Convolution(channels, 192, 1)
        self.branch7x7_1 = Convolution(channels, inner, 1)
        self.branch7x7_2 = Convolution(inner, inner, **row)
        self.branch7x7_3 = Convolution(inner, 192, **column)
        self.branch7x7dbl_1 = Convolution(channels, inner, 1)
        self.branch7x7dbl_2 = Convolution(inner, inner, **column)
        self.branch7x7dbl_3 = Convolution(inner, inner, **row)
        self.branch7x7dbl_4 = Convolution(inner, inner, **column)
        self.branch7x7dbl_5 = Convolution(inner, 192, **row)
        self.branch_pool = Convolution(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), wide, double, self.branch_pool(_mean_pool(x))], 1)


class Reduction17(nn.Module):
    """17×17 → 8×8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(channels, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(channels, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch7x7x3_2(self.branch7x7x3_1(x))
        wide = self.branch7x7x3_4(self.branch7x7x3_3(wide))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), wide, functional.max_pool2d(x, 3, stride=2)], 1)


class Block8(nn.Module):
    """8×8: branches 1×1, 3×3 and double 3×3 (each fanned out as 1×3 and 3×1), pool."""

    def __init__(self, channels: int, *, pool_by_maximum: bool) -> None:
        super().__init__()
        row: dict[str, Any] = {"kernel": (1, 3), "padding": (0, 1)}
        column: dict[str, Any] = {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = Convolution(channels, 320, 1)
        self.branch3x3_1 = Convolution(channels, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, **row)
        self.branch3x3_2b = Convolution(384, 384, **column)
        self.branch3x3dbl_1 = Convolution(channels, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Convolution(384, 384, **row)
        self.branch3x3dbl_3b = Convolution(384, 384, **column)
        self.branch_pool = Convolution(channels, 192, 1)
        self._pool_by_maximum = pool_by_maximum

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = functional.max_pool2d(x, 3, stride=1, padding=1) if self._pool_by_maximum else _mean_pool(x)
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(parts, 1)


class FidInception(nn.Module):
    """The FID variant of Inception-v3."""

    def __init__(self, resize: ResizeName = "pytorch-fid") -> None:
        super().__init__()
        self._resize = tensorflow_bilinear if resize == "tensorflow" else half_pixel_bilinear
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = Block35(192, pooled=32)
        self.Mixed_5c = Block35(256, pooled=64)
        self.Mixed_5d = Block35(288, pooled=64)
        self.Mixed_6a = Reduction35(288)
        self.Mixed_6b = Block17(768, inner=128)
        self.Mixed_6c = Block17(768, inner=160)
        self.Mixed_6d = Block17(768, inner=160)
        self.Mixed_6e = Block17(768, inner=192)
        self.Mixed_7a = Reduction17(768)
        self.Mixed_7b = Block8(1280, pool_by_maximum=False)
        self.Mixed_7c = Block8(2048, pool_by_maximum=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, image_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 RGB [N, 3, H, W] of any size → features [N, 2048], spatial [N, 2023], probabilities [N, 1008].

        The spatial features are those of sFID (Nash et al. 2021, as ADM computes it): the first 7 channels of the
        1×1 branch of the 17×17 block that TensorFlow calls mixed_6. The probabilities leave out the bias of the
        last layer, as the Inception Score's original program does.
        """
        x = self._resize(image_NCHW, INPUT_SIZE)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = functional.max_pool2d(x, 3, stride=2)
        x = functional.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6c(self.Mixed_6b(x))
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))))
        features = x.mean(dim=(2, 3))
        return features, spatial, (features @ self.fc.weight.T).softmax(dim=1)


class StateDictInception:
    """Features from pytorch-fid's state dict, in this module's network."""

    name = "inception"
    dimension = FEATURES
    spatial_dimension: int | None = SPATIAL_FEATURES

    def __init__(
        self,
        state: Mapping[str, Tensor],
        path: Path,
        device: torch.device,
        resize: ResizeName = "pytorch-fid",
    ) -> None:
        network = FidInception(resize)
        # Batch counters of training: no figure depends on them, and files have them or not.
        given = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        wanted = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
        _check_keys(given, wanted, path)
        network.load_state_dict(given, strict=False)
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device
        self.fingerprint = _with_resize(fingerprint_of(given), resize)
        self.description: Mapping[str, Any] = {"file": path.name, "form": "state dict", "resize": resize}

    @torch.inference_mode()
    def features(self, image_NHWC: NDArray[np.uint8]) -> Features:
        """uint8 [N, H, W, C] → `features` [N, 2048], `spatial` [N, 2023], `probabilities` [N, 1008], float32."""
        outputs = self._network(images_to_tensor(image_NHWC, self._device, colour=True))
        names = ("features", "spatial", "probabilities")
        return {name: output.float().cpu().numpy() for name, output in zip(names, outputs, strict=True)}


class TorchScriptInception:
    """Features from NVIDIA's self-contained TorchScript file, which resizes as TensorFlow did."""

    name = "inception"
    dimension = FEATURES
    spatial_dimension: int | None = None

    def __init__(self, module: Any, path: Path, device: torch.device) -> None:
        self._module = module.eval().to(device)
        self._device = device
        self.fingerprint = _with_resize(fingerprint_of(dict(self._module.state_dict())), BY_THE_FILE)
        self.description: Mapping[str, Any] = {"file": path.name, "form": "TorchScript", "resize": BY_THE_FILE}

    @torch.inference_mode()
    def features(self, image_NHWC: NDArray[np.uint8]) -> Features:
        """uint8 [N, H, W, C] → `features` [N, 2048], `probabilities` [N, 1008], float32.

        Raises:
            UserError: the module is not called as NVIDIA's is.
        """
        x_NCHW = images_to_tensor(image_NHWC, self._device, colour=True)
        try:
            features = self._module(x_NCHW, return_features=True)
            # Without the bias of the last layer, as the Inception Score's original program does.
            probabilities = self._module(x_NCHW, no_output_bias=True)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self.description['file']}: cannot be called as {TORCHSCRIPT_FILE} is: {reason}"
            ) from None
        if tuple(features.shape) != (len(x_NCHW), FEATURES):
            raise UserError(
                f"{self.description['file']}: gives features of shape {tuple(features.shape)}; "
                f"expected ({len(x_NCHW)}, {FEATURES})"
            )
        return {
            "features": features.float().cpu().numpy(),
            "probabilities": probabilities.float().cpu().numpy(),
        }


def _with_resize(weights: str, resize: str) -> str:
    """The fingerprint of weights, and of how images come to their size: figures depend on both."""
    return hashlib.sha256(f"{weights} resize {resize}".encode()).hexdigest()[:16]


def load_inception(
    path: Path | None, device: torch.device, resize: ResizeName | None = None
) -> StateDictInception | TorchScriptInception:
    """Load either file; which of the two it is, is told by its contents.

    A TorchScript file is a program: it is loaded from the path that the user names only. The state dict is read
    with `weights_only`.

    Raises:
        UserError: no file is given, it is missing, or it is neither of the two; it resizes otherwise than asked.
    """
    if path is None:
        raise UserError(f"--features inception: no file given; {HOW_TO_GET}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; {HOW_TO_GET}")
    if _is_torchscript(path):
        if resize == "pytorch-fid":
            raise UserError(f"--resize pytorch-fid: {path} resizes by itself, as TensorFlow does; leave it out")
        try:
            module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            return TorchScriptInception(module, path, device)
        except RuntimeError as error:
            raise UserError(f"{path}: unreadable TorchScript file ({str(error).splitlines()[0]})") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's parser raises many types on bytes that are no such file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: neither TorchScript nor a state dict ({reason}); {HOW_TO_GET}") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict of tensors; {HOW_TO_GET}")
    return StateDictInception(state, path, device, resize or "pytorch-fid")


def _is_torchscript(path: Path) -> bool:
    """Whether the zip archive has code beside the tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _check_keys(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    shapes = [
        f"{key} is {tuple(given[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    problems = [
        f"{word}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for word, keys in (
            ("missing", sorted(set(wanted) - set(given))),
            ("unexpected", sorted(set(given) - set(wanted))),
            ("wrong shape", shapes),
        )
        if keys
    ]
    if problems:
        raise UserError(f"{path}: not the state dict of {STATE_DICT_FILE}; {'; '.join(problems)}")
