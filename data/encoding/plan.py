"""What an encode is: the images, the VAE and the settings that its latents depend on, and whether they fit."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.encoding.folder import EncodeFolder
from ditmoe.data.encoding.vae import VaeFacts
from ditmoe.data.shards.index import DatasetIndex, LatentFacts, check_files, load_index
from ditmoe.data.shards.latents import LatentFormat
from ditmoe.data.shards.sample_table import SampleColumns, digest_of_members, read_table, usable_members
from ditmoe.data.stream.config import SourceConfig
from ditmoe.data.stream.left_out import LeftOut
from ditmoe.model.errors import UserError

FORM_VERSION: Final = 2
"""Raised whenever equal settings give other bytes."""

Dtype = Literal["float32", "float16", "bfloat16"]
Flips = Literal["none", "both", "drawn"]


@dataclass(frozen=True)
class EncodeSettings:
    """How images are encoded."""

    dtype: Dtype = "float16"
    """Of the stored moments."""
    flips: Flips = "none"
    """Mirror images: not stored, stored beside each image, or in its place by a coin."""
    format: LatentFormat = "safetensors"
    seed: int = 0
    """Of the coins, with the number of the sample in the index."""
    batch: int = 16
    """Images through the VAE at once, on a GPU."""
    overwrite: bool = False
    """Replace a dataset that is already there."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about an image that cannot be used: stop, or leave it out, as training does."""


@dataclass(frozen=True)
class Encoding:
    """One encode: from where, to where, with which VAE. The same in each process that takes part."""

    source: Path
    index: DatasetIndex
    """Of the images."""
    samples: SampleColumns | None
    """Their labels and scores."""
    vae: VaeFacts
    settings: EncodeSettings
    folder: EncodeFolder

    def new_left_out(self) -> LeftOut:
        """Takes the images that cannot be used; empty."""
        return LeftOut(SourceConfig(path=str(self.source), on_error=self.settings.on_error))

    @cached_property
    def members(self) -> tuple[NDArray[np.int64], ...]:
        """Of each shard the numbers of the samples that are encoded."""
        return usable_members(self.index, self.samples)

    @property
    def latents(self) -> LatentFacts:
        """How the latents come about."""
        return LatentFacts(
            vae=str(self.vae.path.absolute()),
            vae_sha256=self.vae.sha256,
            scale=self.vae.scale,
            shift=self.vae.shift,
            pixels=self.index.image_size,
            dtype=self.settings.dtype,
            flips=self.settings.flips,
        )


def prepare_encoding(
    source: Path, out: Path, vae: VaeFacts, settings: EncodeSettings, index_folder: Path | None = None
) -> Encoding:
    """Look at everything that is needed, before anything is written.

    Args:
        source: folder of the images' shards.
        out: where the latents go.
        index_folder: where the index of the images lies; None: with the shards.

    Raises:
        UserError: the images are missing, or do not fit the VAE; or the options do not fit each other.
    """
    index_folder = index_folder or source
    index = load_index(index_folder)
    problems = check_files(source, index)
    if index.latents is not None:
        problems.append(f"{source}: holds latents already, expected images")
    elif index.channels != vae.pixel_channels:
        problems.append(
            f"{source}: images of {index.channels} channels, and the VAE {vae.path} takes {vae.pixel_channels}: "
            f"pack them with --channels {vae.pixel_channels}"
        )
    elif index.image_size % vae.reduction:
        problems.append(
            f"{source}: images of {index.image_size} pixels, and the VAE {vae.path} takes multiples of "
            f"{vae.reduction}: pack them with another --image-size"
        )
    if settings.format == "npy" and settings.dtype == "bfloat16":
        problems.append(
            "--format npy has no bfloat16: expected --dtype float32 or float16, or --format safetensors"
        )
    samples = read_table(index_folder, index)
    problems += [
        f"{source / entry.file}: none of its samples can be used; index the folder again without it"
        for entry, members in zip(index.shards, usable_members(index, samples), strict=True)
        if not len(members)
    ]
    if out.resolve() in (source.resolve(), index_folder.resolve()):
        problems.append(f"{out}: is where the images are, or their index; choose another folder")
    if problems:
        raise UserError("\n".join(problems))
    members = usable_members(index, samples)
    left_out = sum(map(len, members)) < index.total
    wanted: dict[str, Any] = {
        "form": FORM_VERSION,
        "source": index.name,
        # Of everything but where the shards lie: another label rule or crop gives other samples of the same bytes.
        "source_sha256": index.fingerprint,
        "used_sha256": digest_of_members(members) if left_out else None,
        "image_size": index.image_size,
        "crop": index.crop,
        "label": index.label.model_dump(),
        "class_names": list(index.class_names),
        "vae_sha256": vae.sha256,
        "dtype": settings.dtype,
        "flips": settings.flips,
        "seed": settings.seed if settings.flips == "drawn" else None,
        "format": settings.format,
    }
    shards = tuple(entry.file for entry in index.shards)
    read = (source, index_folder, vae.path, *(source / shard for shard in shards))  # shards may be links
    return Encoding(source, index, samples, vae, settings, EncodeFolder(out, wanted, shards, read))
