"""The autoencoder between pixels and latents: a diffusers AutoencoderKL on the local disk.

diffusers is imported when one is loaded, and nothing is ever fetched. Moments and latents are computed in float32,
without TF32 and by deterministic kernels.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import torch
from pydantic import BaseModel, Field, StrictInt, ValidationError
from torch import Tensor

from ditmoe.data.shards.images import to_network_range
from ditmoe.data.shards.index import LatentFacts
from ditmoe.data.storage.digests import sha256_of
from ditmoe.model.errors import UserError
from ditmoe.model.weights.untrusted import first_problem, parse_json, read_file

CONFIG_FILE: Final = "config.json"
MOST_CONFIG_BYTES: Final = 2**20
LARGEST_SCALE: Final = 1e9
WEIGHTS_FILE: Final = "diffusion_pytorch_model.safetensors"
INDEX_SUFFIX: Final = ".index.json"
"""Of a list of several weights files."""
CLASS: Final = "AutoencoderKL"
DECODED_IMAGES: Final = 8
"""Most images that a GPU decodes at once, …"""
DECODED_PIXELS: Final = 8 * 256 * 256
"""… and most pixels, but at least one image."""
_WEIGHTS: Final = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")


class VaeFacts(NamedTuple):
    """What is known of an autoencoder without reading its weights into memory."""

    path: Path
    sha256: str
    """Of its configuration and its weights file."""
    scale: float
    """Factor on (latent − shift) before training."""
    shift: float
    pixel_channels: int
    latent_channels: int
    reduction: int
    """Pixels that one latent cell covers along each side."""


@dataclass(frozen=True)
class Vae:
    """A loaded autoencoder on its device."""

    facts: VaeFacts
    network: Any
    """The AutoencoderKL, in evaluation mode."""
    device: torch.device

    def encode_moments(self, image_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents of some images.

        Args:
            image_BHWC: uint8 `[B, H, W, C]`, of sides that `reduction` divides.

        Returns:
            Two of float32 `[B, C, H, W]` on the CPU, neither shifted nor scaled.
        """
        x_BCHW = to_network_range(image_BHWC.to(self.device).permute(0, 3, 1, 2).contiguous())
        with torch.inference_mode(), _exact():
            moments = self.network.encode(x_BCHW).latent_dist
            return moments.mean.float().cpu(), moments.logvar.float().cpu()

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Scaled latents, as a network draws them, `[B, C, H, W]` → float32 images about −1 … 1, on the device.

        They pass in equal parts, the last one filled up, so that B does not change an image by rounding, and the
        memory is bounded.
        """
        latent_BCHW = latent_BCHW.to(self.device, torch.float32) / self.facts.scale + self.facts.shift
        pixels = latent_BCHW.shape[2] * latent_BCHW.shape[3] * self.facts.reduction**2
        # A CPU gains nothing from more.
        part = 1 if self.device.type == "cpu" else max(1, min(DECODED_IMAGES, DECODED_PIXELS // pixels))
        images = []
        with torch.inference_mode(), _exact():
            for part_BCHW in torch.split(latent_BCHW, part):
                count = len(part_BCHW)
                filled_BCHW = torch.cat([part_BCHW, part_BCHW[-1:].expand(part - count, -1, -1, -1)])
                images.append(self.network.decode(filled_BCHW).sample[:count].float())
        return torch.cat(images)


class _Sizes(BaseModel):
    """What of a configuration decides how large a network is built; the limits are beyond any in use."""

    in_channels: Annotated[StrictInt, Field(ge=1, le=1024)] = 3
    out_channels: Annotated[StrictInt, Field(ge=1, le=1024)] = 3
    latent_channels: Annotated[StrictInt, Field(ge=1, le=1024)] = 4
    block_out_channels: list[Annotated[StrictInt, Field(ge=1, le=8192)]] = Field([64], min_length=1, max_length=12)
    layers_per_block: Annotated[StrictInt, Field(ge=1, le=64)] = 1


def read_facts(path: Path) -> VaeFacts:
    """Read the configuration of the autoencoder in a folder, and checksum its weights.

    Raises:
        UserError: there is none, it is no AutoencoderKL, or its weights are not in one safetensors file.
    """
    config = _read_config(path)
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        others = sorted(file.name for file in path.iterdir() if file.suffix in _WEIGHTS)
        pickle = " (a pickle is never read)" if any(not name.endswith(".safetensors") for name in others) else ""
        raise UserError(f"{path}: has {', '.join(others) or 'no weights'}{pickle}; expected {WEIGHTS_FILE}")
    parts = sorted(file.name for file in path.iterdir() if file.name.endswith(INDEX_SUFFIX))
    if parts:  # diffusers would load what it lists, under the checksum of the one file
        raise UserError(f"{path}: has {parts[0]} beside {WEIGHTS_FILE}; expected the weights in one file alone")
    try:
        weights_sha256 = sha256_of(weights)
    except OSError as error:
        raise UserError(f"{weights}: could not be read: {error.strerror or error}") from error
    # What begins with _ is where and by which version it was saved, not what it computes.
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    text = json.dumps(settings, sort_keys=True)
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor") or 0.0
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise UserError(
            f"{path / CONFIG_FILE}: has latents_mean or latents_std; expected one scale for all channels"
        )
    numbers = all(isinstance(number, int | float) and abs(number) < LARGEST_SCALE for number in (scale, shift))
    if not numbers or scale <= 0:
        found = f"scaling_factor is {repr(scale)[:40]}, shift_factor {repr(shift)[:40]}"
        raise UserError(f"{path / CONFIG_FILE}: {found}; expected numbers")
    try:
        sizes = _Sizes.model_validate(config)
    except ValidationError as error:
        raise UserError(f"{path / CONFIG_FILE}: does not describe an {CLASS}: {first_problem(error)}") from error
    return VaeFacts(
        path=path,
        sha256=hashlib.sha256(f"{text}\n{weights_sha256}\n".encode()).hexdigest(),
        scale=float(scale),
        shift=float(shift),
        pixel_channels=sizes.in_channels,
        latent_channels=sizes.latent_channels,
        reduction=2 ** (len(sizes.block_out_channels) - 1),
    )


def _read_config(path: Path) -> dict[str, Any]:
    """The configuration. UserError where it is not that of an AutoencoderKL."""
    expected = f"expected the local folder of a diffusers {CLASS} ({CONFIG_FILE} and {WEIGHTS_FILE})"
    file = path / CONFIG_FILE
    try:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; {expected}; nothing is downloaded")
        if not file.is_file():
            hint = f"; {path / 'vae'} has one" if (path / "vae" / CONFIG_FILE).is_file() else ""
            raise UserError(f"{path}: has no {CONFIG_FILE}; {expected}{hint}")
        config = parse_json(read_file(file, MOST_CONFIG_BYTES))
    except (OSError, ValueError) as error:  # also of a path that a system cannot have, from a stranger's index
        raise UserError(f"{str(file)[:500]}: could not be read: {getattr(error, 'strerror', error)}") from error
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != CLASS:
        raise UserError(f"{file}: _class_name is {found!r}; {expected}")
    return dict(config)


def load_vae(facts: VaeFacts, device: str | torch.device = "cpu") -> Vae:
    """Load the autoencoder that `read_facts` found. UserError when its weights do not fit its configuration."""
    from diffusers import AutoencoderKL

    try:
        network, report = AutoencoderKL.from_pretrained(
            str(facts.path),
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # an odd configuration makes diffusers raise nearly anything
        text = (str(error).strip() or type(error).__name__)[:1000]
        raise UserError(f"{facts.path}: could not be loaded as an {CLASS}: {text}") from error
    problems = [
        f"{key.removesuffix('_keys')}: {', '.join(map(str, report[key][:3]))}"
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report[key]
    ]
    if problems:  # diffusers would go on with random numbers in their place
        raise UserError(f"{facts.path / WEIGHTS_FILE}: weights do not fit {CONFIG_FILE}: {'; '.join(problems)}")
    return Vae(facts, network.to(device).eval().requires_grad_(False), torch.device(device))


def find_vae(latents: LatentFacts, moved_to: Path | None = None, option: str = "--vae FOLDER") -> VaeFacts:
    """The autoencoder that encoded a dataset.

    Args:
        latents: of the dataset's index.
        moved_to: where it lies now; None: where it lay then.
        option: with which the user says so, for messages.

    Raises:
        UserError: it is not there, or another.
    """
    path = moved_to or Path(latents.vae)
    try:
        facts = read_facts(path)
    except UserError as error:
        hint = "" if moved_to else f"; it encoded the data: say where it lies now with {option}"
        raise UserError(f"{error}{hint}") from error
    if facts.sha256 != latents.vae_sha256:
        raise UserError(
            f"{path}: checksum is {facts.sha256}; expected {latents.vae_sha256}, of the VAE that encoded the data "
            f"(then at {latents.vae})"
        )
    return facts


@contextmanager
def _exact() -> Iterator[None]:
    """Full float32 and deterministic convolutions on a GPU, for the body alone."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
