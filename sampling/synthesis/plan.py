"""What a synthesis is of: the network, the images, their classes and scores, and where they go.

The plan holds all that the bytes depend on. It is written to the folder first, so that repeating a command goes on
with a dataset only when it would be the same.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.encoding.vae import VaeFacts
from ditmoe.data.making.ownership import (
    FINISHED,
    PLAN_FILE,
    SETTINGS_FILE,
    WORK_FOLDER,
    Record,
    refuse_finished,
    refuse_holding,
    refuse_others,
)
from ditmoe.data.making.pack import ImageFormat
from ditmoe.data.shards.index import INDEX_FILE
from ditmoe.data.storage.files import read_settings
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import printable
from ditmoe.parallel.checkpoint.folder import CheckpointInfo, read_info
from ditmoe.sampling.chains.images import classifier_fingerprint
from ditmoe.sampling.jobs.chunks import ChunkStore
from ditmoe.sampling.metrics.networks.opening import check_network_options
from ditmoe.sampling.metrics.quality import ScoreSettings, plain_settings
from ditmoe.sampling.metrics.reference import OnError, ReferenceImages, reference_of_run
from ditmoe.sampling.metrics.references.files import open_reference_file
from ditmoe.sampling.network.denoiser import check_guidance
from ditmoe.sampling.network.load import Weights, complete_config, find_checkpoint, find_decoder, home_of
from ditmoe.sampling.settings.config import SAMPLER_RULES, SamplerConfig

LARGEST_CHUNK: Final = 256
"""Images that are drawn and kept as one: whole batches, up to about so many."""


@dataclass(frozen=True)
class SynthesisOptions:
    """What the user chose."""

    source: Path
    """A run folder, or one of its checkpoints."""
    out: Path
    sampler: SamplerConfig
    count: int
    classes: tuple[int, ...] | None = None
    """Labels that the images take in turn; null: all of the network's."""
    weights: Weights = "ema"
    step: int | None = None
    batch: int = 64
    format: ImageFormat = "png"
    shard_samples: int = 1000
    score: ScoreSettings = field(default_factory=ScoreSettings)
    reference: str | Path | None = None
    """Where the real images that scores go by lie, as a source's `path`; null: where the run's lay."""
    index: Path | None = None
    """Folder of their index; null: it is with them."""
    on_error: OnError | None = None
    """What to do about real images that cannot be used; null: what the run did."""
    cache: Path = Path()
    """Folder of trained classifiers and of means of real images."""
    vae: Path | None = None
    """Where the VAE of a network of latents lies now; null: where it lay when they were encoded."""
    name: str | None = None
    """The dataset's name; null: after the run."""
    overwrite: bool = False
    """Replace what is in `out`."""


@dataclass(frozen=True)
class Synthesis:
    """A dataset to be made, or made in part."""

    options: SynthesisOptions
    checkpoint: Path
    class_names: tuple[str, ...]
    real: ReferenceImages | None
    """What scores go by; null: there are none."""
    vae: Path | None
    """The VAE that decodes what the network draws; null: it draws pixels."""
    plan: dict[str, Any] = field(default_factory=dict)
    """All that the bytes depend on, as plain data."""

    @property
    def out(self) -> Path:
        """The folder."""
        return self.options.out

    @property
    def count(self) -> int:
        """Images in all."""
        return self.options.count

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.options.shard_samples)

    @cached_property
    def fingerprint(self) -> str:
        """Of the plan (first 16 hex digits of SHA-256)."""
        return hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def store(self) -> ChunkStore:
        """The images as they were drawn."""
        return ChunkStore(self.out / WORK_FOLDER / "chunks", self.count, self.plan["chunk"], self.fingerprint)

    def numbers(self, shard: int) -> list[int]:
        """The numbers of a shard's images."""
        size = self.options.shard_samples
        return list(range(shard * size, min((shard + 1) * size, self.count)))

    def chunks_of(self, shard: int) -> range:
        """The chunks that a shard's images are in."""
        numbers = self.numbers(shard)
        return range(numbers[0] // self.store.size, numbers[-1] // self.store.size + 1)

    def labels_of(self, numbers: list[int]) -> NDArray[np.int64]:
        """The classes of the images with these numbers, int64 [len(numbers)]; samples of a chain share one."""
        classes = np.array(self.plan["classes"], dtype=np.int64)
        return classes[np.array(numbers, dtype=np.int64) // self.sampler.images_per_unit % len(classes)]

    @cached_property
    def sampler(self) -> SamplerConfig:
        """How images are drawn, resolved."""
        return SamplerConfig.model_validate(self.plan["sampler"])

    @property
    def stem(self) -> str:
        """What the names of shards begin with."""
        return re.sub(r"[^A-Za-z0-9_-]+", "-", self.plan["name"]).strip("-")[:60] or "synthetic"

    @property
    def record(self) -> Record:
        """What is written to the folder."""
        return Record(files=(*FINISHED, PLAN_FILE, f"{WORK_FOLDER}/"), stem=self.stem)

    def shard_path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.out / f"{self.stem}-{shard:05d}.tar"

    def record_path(self, shard: int) -> Path:
        """Says that a shard is there: its checksum and scores."""
        return self.out / WORK_FOLDER / "done" / f"{shard:05d}.json"


def class_names_of(info: CheckpointInfo) -> tuple[str, ...]:
    """The names of a checkpoint's classes, fit to print, or their numbers where it has no names."""
    number = info.model.num_classes or info.dataset["num_classes"]
    return tuple(printable(str(name)) for name in info.dataset.get("class_names") or range(number))


def prepare_synthesis(options: SynthesisOptions) -> Synthesis:
    """Find everything that is needed, so that what is missing shows before a process is started.

    Raises:
        UserError: no checkpoint, no real images to score by, they do not fit together, or `out` is taken.
    """
    path = find_checkpoint(options.source, options.step)
    info = read_info(path)
    if options.weights not in info.parts:
        raise UserError(f"{path}: has no {options.weights}; it has {', '.join(info.parts)}")
    names = class_names_of(info)
    decoder = find_decoder(info, options.vae)
    size, channels = _form(info, decoder)
    if channels not in (1, 3) and options.format != "npy":
        raise UserError(f"{path}: draws {channels} channels, and only 1 or 3 make a picture; give --format npy")
    home = home_of(path).resolve()
    real = _reference(options, info, (size, channels, len(names)))
    batch = min(options.batch, options.count)
    check_guidance(complete_config(info.model, info), options.sampler)
    sampler = options.sampler.resolved(info.objective)
    samples = sampler.images_per_unit
    plan = {
        "checkpoint": {
            "fingerprint": info.fingerprint,
            "name": path.resolve().name if home == path.resolve() else f"{home.name}/{path.name}",
            "step": info.step,
            "weights": options.weights,
        },
        "sampler": sampler.plain(),
        "sampler_rules": SAMPLER_RULES,
        "count": options.count,
        "classes": list(options.classes if options.classes is not None else range(len(names))),
        "batch": batch,
        "chunk": samples * min(batch, -(-options.count // samples))
        if sampler.chains
        else batch * max(1, LARGEST_CHUNK // batch),
        "shard_samples": options.shard_samples,
        "format": options.format,
        "name": options.name or printable(f"{home.name}-synthetic"),
        "score": plain_settings(options.score, real),
        "vae": None if decoder is None else decoder.sha256,
        **({"noise_classifier": classifier_fingerprint(info, [sampler])} if sampler.chains else {}),
    }
    vae = None if decoder is None else decoder.path
    synthesis = Synthesis(options, path, names, real, vae, plan)
    check_out(synthesis)
    return synthesis


def _form(info: CheckpointInfo, decoder: VaeFacts | None) -> tuple[int, int]:
    """Side in pixels and channels of the images that come out."""
    size, channels = (int(getattr(info.model, key) or info.dataset[key]) for key in ("image_size", "channels"))
    return (size, channels) if decoder is None else (size * decoder.reduction, decoder.pixel_channels)


def _reference(
    options: SynthesisOptions, info: CheckpointInfo, expected: tuple[int, int, int]
) -> ReferenceImages | None:
    """The real images that scores go by. UserError when they are not there, or of another kind."""
    score = options.score
    check_network_options(score.features if score.kind == "features" else "classifier", score.features_path)
    if options.score.kind == "none":
        if options.reference is not None:
            raise UserError(f"--reference {options.reference}: with --score none there is nothing to score by it")
        return None
    file = open_reference_file(options.reference)
    if file is not None:
        raise UserError(f"{file.where}: is a file; expected shards, whose images and classes the scores go by")
    try:
        real = reference_of_run(info, options.reference, options.index, options.on_error, "--reference")
    except UserError as error:
        hint = "" if options.reference else "; --score none needs none"
        raise UserError(f"{error}{hint}") from error
    found = (real.index.image_size, real.index.channels, real.index.num_classes)
    problems = [
        f"{name} is {has}, expected {wants}"
        for name, has, wants in zip(("image_size", "channels", "num_classes"), found, expected, strict=True)
        if has != wants
    ]
    if problems:
        raise UserError(f"{real.where}: not what the network of {info.path} draws: {'; '.join(problems)}")
    return real


def check_out(synthesis: Synthesis) -> None:
    """UserError when the folder holds anything but a part of this dataset, and shall stay."""
    out, overwrite = synthesis.out, synthesis.options.overwrite
    read = [synthesis.checkpoint, *([] if synthesis.real is None else synthesis.real.source.folders)]
    refuse_holding(out, [*read, *([] if synthesis.vae is None else [synthesis.vae])])
    stored = read_plan(out)
    if stored == synthesis.plan:
        return
    if stored is None:
        refuse_finished(out, overwrite)
    refuse_others(out)
    if stored is not None and not overwrite:
        changed = "; ".join(_differences(synthesis.plan, stored))
        raise UserError(
            f"{out}: holds a synthesis with other settings: {changed}; repeat the command as it was, choose "
            "another folder, or --overwrite"
        )
    if (out / SETTINGS_FILE).exists() and not (out / INDEX_FILE).exists() and not overwrite:
        raise UserError(f"{out}: holds an encode that is not finished; --overwrite replaces it")


def _differences(plan: dict[str, Any], stored: dict[str, Any], within: str = "") -> Iterator[str]:
    """What two plans do not have in common, each setting of a section by itself."""
    for key in {**plan, **stored}:
        now, before = plan.get(key), stored.get(key)
        if isinstance(now, dict) and isinstance(before, dict):
            yield from _differences(now, before, f"{within}{key}.")
        elif now != before:
            yield f"{within}{key} is {json.dumps(now)}, and was {json.dumps(before)}"


def read_plan(out: Path) -> dict[str, Any] | None:
    """The plan in a folder; null: there is none. UserError when it is damaged."""
    return read_settings(out / PLAN_FILE)
