"""DINOv2 (Oquab et al. 2023), in whose features FD-DINOv2 is measured, from a local safetensors file.

A vision transformer (Dosovitskiy et al. 2021) of patches of 14 with LayerScale (Touvron et al. 2021); the image is
described by the class token after the last norm. Images are prepared as dgm-eval does (Stein et al. 2023): resized
straight to 224², bicubic, without a crop.

Keys are those of facebookresearch's files (`blocks.0.attn.qkv.weight`, …) or of Hugging Face's
(`encoder.layer.0.attention.attention.query.weight`, …).

Shapes: N images, T tokens, D features, P patches along a side.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from ditmoe.model.errors import UserError
from ditmoe.sampling.metrics.features import Features, fingerprint_of
from ditmoe.sampling.metrics.networks.resize import pillow_bicubic

PATCH: Final = 14
SIZE: Final = 224
HEAD: Final = 64
"""Features of an attention head."""
MEAN: Final = (0.485, 0.456, 0.406)
DEVIATION: Final = (0.229, 0.224, 0.225)
"""Of ImageNet's colours."""
NAMES: Final = {384: "ViT-S/14", 768: "ViT-B/14", 1024: "ViT-L/14"}
PREPARATION: Final = f"bicubic to {SIZE} by Pillow, antialiased, no crop; ImageNet mean and deviation"
HOW_TO_GET: Final = (
    "the DINOv2 weights are a file that you give with --features-path: model.safetensors of "
    "facebook/dinov2-large (or -base, -small) on Hugging Face, or facebookresearch's dinov2_vitl14_pretrain.pth "
    "saved as safetensors"
)
_OFFSET: Final = 0.1
"""What the published network adds to the number of patches before it takes the scale of the positions."""
_EPSILON: Final = 1e-6
_BLOCK_KEYS: Final = re.compile(r"blocks\.(\d+)\.")
_HUGGING_FACE: Final = (
    (r"^dinov2\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)
"""Patterns of Hugging Face's keys and what they become; facebookresearch's match none of them."""


class _Scale(nn.Module):
    """A factor for each feature."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(features))

    def forward(self, x_NTD: Tensor) -> Tensor:
        return x_NTD * self.gamma


class _Attention(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)
        self._heads = features // HEAD

    def forward(self, x_NTD: Tensor) -> Tensor:
        images, tokens, features = x_NTD.shape
        shape = (images, tokens, self._heads, HEAD)
        query, key, value = (each.reshape(shape).transpose(1, 2) for each in self.qkv(x_NTD).chunk(3, dim=2))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        joined: Tensor = self.proj(mixed.transpose(1, 2).reshape(images, tokens, features))
        return joined


class _Perceptron(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, features)

    def forward(self, x_NTD: Tensor) -> Tensor:
        found: Tensor = self.fc2(functional.gelu(self.fc1(x_NTD)))
        return found


class _Block(nn.Module):
    """x += γ₁·attention(norm(x)); x += γ₂·mlp(norm(x))."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features, eps=_EPSILON)
        self.attn = _Attention(features)
        self.ls1 = _Scale(features)
        self.norm2 = nn.LayerNorm(features, eps=_EPSILON)
        self.mlp = _Perceptron(features)
        self.ls2 = _Scale(features)

    def forward(self, x_NTD: Tensor) -> Tensor:
        x_NTD = x_NTD + self.ls1(self.attn(self.norm1(x_NTD)))
        found: Tensor = x_NTD + self.ls2(self.mlp(self.norm2(x_NTD)))
        return found


class _PatchEmbedding(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, features, PATCH, PATCH)


class VisionTransformer(nn.Module):
    """The network; its parameters have the names of facebookresearch's files."""

    def __init__(self, features: int, depth: int, patches: int) -> None:
        """`patches` along a side are those whose positions the weights have."""
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, features))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches**2, features))
        self.patch_embed = _PatchEmbedding(features)
        self.blocks = nn.ModuleList(_Block(features) for _ in range(depth))
        self.norm = nn.LayerNorm(features, eps=_EPSILON)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Normalised colours [N, 3, P·14, P·14] → class tokens [N, D]."""
        patch_NTD = self.patch_embed.proj(image_NCHW).flatten(2).transpose(1, 2)
        class_N1D = self.cls_token.expand(len(image_NCHW), -1, -1)
        x_NTD = torch.cat((class_N1D, patch_NTD), 1) + self.positions(image_NCHW.shape[-1] // PATCH)
        for block in self.blocks:
            x_NTD = block(x_NTD)
        found: Tensor = self.norm(x_NTD[:, 0])
        return found

    def positions(self, patches: int) -> Tensor:
        """Position embeddings [1, 1 + P², D], bicubically between those of the weights.

        The published network scales by (P + 0.1) / (patches of the weights), which is kept: the positions differ
        a little from those of a scale of P.
        """
        stored = math.isqrt(self.pos_embed.shape[1] - 1)
        if stored == patches:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
        scale = (patches + _OFFSET) / stored
        grid = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        assert grid.shape[2:] == (patches, patches), grid.shape
        return torch.cat((self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)), 1)


class DinoV2:
    """Class tokens as features."""

    name = "dinov2"
    spatial_dimension: int | None = None

    def __init__(self, state: Mapping[str, Tensor], path: Path, device: torch.device) -> None:
        """Of a file's tensors. UserError when they are of another network."""
        own = _own_names(state)
        self.dimension, depth, patches = _sizes(own, path)
        network = VisionTransformer(self.dimension, depth, patches)
        own.pop("mask_token", None)  # of training
        _check(own, network.state_dict(), path)
        network.load_state_dict({key: value.float() for key, value in own.items()})
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device
        weights = fingerprint_of(network.state_dict())
        self.fingerprint = hashlib.sha256(f"{weights} {PREPARATION}".encode()).hexdigest()[:16]
        self.description: Mapping[str, Any] = {
            "file": path.name,
            "form": NAMES.get(self.dimension, f"ViT of {depth} × {self.dimension}, patches of {PATCH}"),
            "resize": PREPARATION,
        }

    @torch.inference_mode()
    def features(self, image_NHWC: NDArray[np.uint8]) -> Features:
        """uint8 [N, H, W, 1 or 3] → `features` [N, D] float32."""
        colour_NHWC = np.repeat(image_NHWC, 3, axis=3) if image_NHWC.shape[3] == 1 else image_NHWC
        x_NHWC = torch.from_numpy(pillow_bicubic(colour_NHWC, SIZE)).to(self._device).float() / 255
        x_NHWC = (x_NHWC - x_NHWC.new_tensor(MEAN)) / x_NHWC.new_tensor(DEVIATION)
        return {"features": self._network(x_NHWC.permute(0, 3, 1, 2).contiguous()).cpu().numpy()}


def load_dinov2(path: Path | None, device: torch.device) -> DinoV2:
    """The network in a file.

    Raises:
        UserError: no file is given, it is missing, or of another network.
    """
    if path is None:
        raise UserError(f"--features dinov2: no file given; {HOW_TO_GET}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; {HOW_TO_GET}")
    try:
        with safe_open(path, framework="pt") as stored:
            state = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: no safetensors file ({error}); {HOW_TO_GET}") from error
    return DinoV2(state, path, device)


def _own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by facebookresearch's names."""
    found = {}
    for key, value in state.items():
        own = key
        for pattern, replacement in _HUGGING_FACE:
            own = re.sub(pattern, replacement, own)
        found[own] = value
    for key in [key for key in found if ".attn.query." in key]:
        parts = [found.pop(key.replace(".query.", f".{part}."), None) for part in ("query", "key", "value")]
        whole = [part for part in parts if part is not None]
        found[key.replace(".query.", ".qkv.")] = torch.cat(whole)
    return found


def _sizes(state: Mapping[str, Tensor], path: Path) -> tuple[int, int, int]:
    """Features, blocks, and patches along a side of the positions."""
    positions = state.get("pos_embed")
    blocks = {int(found[1]) for key in state if (found := _BLOCK_KEYS.match(key))}
    if positions is None or positions.ndim != 3 or not blocks:
        raise UserError(f"{path}: holds no DINOv2: it has no pos_embed [1, 1 + P², D] and blocks; {HOW_TO_GET}")
    features, tokens = positions.shape[2], positions.shape[1] - 1
    patches = math.isqrt(max(tokens, 0))
    if (
        patches < 1
        or patches**2 != tokens
        or features % HEAD
        or max(features, patches) > 4096
        or max(blocks) > 255
    ):
        raise UserError(
            f"{path}: its pos_embed is {tuple(positions.shape)}; expected [1, 1 + P², D], D a multiple of {HEAD}"
        )
    return features, max(blocks) + 1, patches


def _check(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    problems = [f"{key} is missing" for key in wanted if key not in given]
    problems += [f"{key} is unexpected" for key in given if key not in wanted]
    problems += [
        f"{key} is {tuple(given[key].shape)}, expected {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in given and given[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{path}: not a DINOv2 of size S, B or L without registers: {'; '.join(problems[:3])}{more}"
        )
