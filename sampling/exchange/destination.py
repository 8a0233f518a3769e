"""Where weights go: a file, a checkpoint of ours, or a folder of diffusers; whole or not at all, with a card."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch.distributed.checkpoint.api import CheckpointException

from ditmoe.data.encoding.vae import VaeFacts, read_facts
from ditmoe.data.shards.index import LatentFacts
from ditmoe.model.errors import UserError
from ditmoe.model.outside.files import replacing, temporary_beside
from ditmoe.model.weights.diffusers import PIPELINE_FILE
from ditmoe.model.weights.files import INDEX_SUFFIX, PT_SUFFIXES, SAFETENSORS, SHARD_BYTES
from ditmoe.model.weights.lazy import read
from ditmoe.model.weights.positions import check_position_embedding
from ditmoe.model.weights.published import PublishedWeights, save_published
from ditmoe.parallel.checkpoint.folder import read_info, write_weights_checkpoint
from ditmoe.parallel.checkpoint.marker import MARKER
from ditmoe.sampling.exchange.card import CARD, model_card
from ditmoe.sampling.exchange.folder import departures, loading_lines, write_pipeline
from ditmoe.sampling.exchange.source import Source
from ditmoe.sampling.network.load import find_decoder

Kind = Literal[".pt", ".safetensors", "checkpoint", "diffusers"]


@dataclass(frozen=True)
class Destination:
    """Where weights go, and in which form."""

    path: Path
    kind: Kind
    bare: bool = False
    """A .pt file that is nothing but one set."""
    overwrite: bool = False
    stock: bool = False
    """diffusers' own class, in spite of its other frequencies of time."""
    shard_bytes: int = SHARD_BYTES

    @property
    def single(self) -> bool:
        """Whether it takes one set of weights."""
        return self.bare or self.kind in (".safetensors", "diffusers")


def check_destination(
    path: Path, form: Literal["checkpoint", "diffusers"] | None, *, overwrite: bool, source: Path
) -> Kind:
    """What a destination's name asks for.

    Raises:
        UserError: it has an ending of something else, or something is there that is not to be overwritten.
    """
    kind: Kind = form or "checkpoint"
    if form is None and path.suffix == SAFETENSORS:
        kind = ".safetensors"
    elif form is None and path.suffix in PT_SUFFIXES:
        kind = ".pt"
    elif form is None and path.suffix[1:].isalpha():
        raise UserError(f"{path}: ends with {path.suffix!r}, expected .pt, {SAFETENSORS}, or a folder's name")
    taken = [path]
    if kind == ".safetensors":
        taken.append(path.with_name(path.stem + INDEX_SUFFIX))
    if kind in (".pt", ".safetensors"):
        taken.append(card_file(path))
    for existing in taken:
        if os.path.lexists(existing) and not overwrite:
            raise UserError(f"{existing}: exists already; give --overwrite, or choose another name")
    if os.path.lexists(path):
        _check_overwriting(path, kind, source)
    return kind


def _check_overwriting(path: Path, kind: Kind, source: Path) -> None:
    """UserError where what is to be overwritten is not what an export makes, or is what is exported."""
    inside = source.exists() and source.resolve().is_relative_to(path.resolve())
    if inside:
        raise UserError(f"{path}: is what is converted, or holds it; choose another name")
    if kind in (".pt", ".safetensors"):
        if not path.is_file():
            raise UserError(f"{path}: is no file, and is not overwritten")
        return
    if (path / MARKER).is_file() and read_info(path).layout is None:
        return
    if not path.is_dir() or not (path / PIPELINE_FILE).is_file():
        raise UserError(f"{path}: is no folder that `ditmoe convert` wrote, and is not overwritten")


def card_file(path: Path) -> Path:
    """The card of a file of weights: beside it, under its name."""
    return path.with_name(f"{path.name}.md")


def write(
    source: Source,
    destination: Destination,
    vae: Path | None = None,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write weights and their card.

    Args:
        vae: what decodes latents; None: as the checkpoint or the pipeline says that they come from.
        say: told what is worth knowing.

    Returns:
        what is to be read.

    Raises:
        UserError: something is not known that it takes, or the disk refuses.
    """
    published = source.published
    sets = [which for which in ("ema", "weights") if getattr(published, which) is not None]
    path = destination.path
    if destination.kind in (".pt", ".safetensors"):
        written = save_published(
            published,
            path,
            bare=destination.bare,
            shard_bytes=destination.shard_bytes,
            overwrite=destination.overwrite,
            progress=progress,
        )[-1]
        lines = ["from ditmoe.model import load_published", "", f'config, state = load_published("{path.name}")']
        lines += ["", f"# or: ditmoe convert {path.name} FOLDER"]
        with replacing(card_file(path)) as file:
            file.write(model_card(path.stem, published, source.info, sets, lines).encode())
        return written
    decoder = _decoder(source, vae, say)
    with _whole_folder(path, destination.overwrite) as folder:
        if destination.kind == "diffusers":
            lines = loading_lines(path.name, published, decoder, destination.stock)
            card = model_card(path.name, published, source.info, sets, lines, library="diffusers")
            for line in departures(published, destination.stock):
                say(line)
            folder.mkdir(parents=True)
            write_pipeline(
                folder,
                published,
                decoder,
                card,
                destination.shard_bytes,
                stock=destination.stock,
                progress=progress,
            )
        else:
            _write_checkpoint(folder, path, published, decoder, say)
            lines = [f"ditmoe sample {path.name}"]
            (folder / CARD).write_text(
                model_card(path.name, published, source.info, sets, lines), encoding="utf-8"
            )
    return path


@contextmanager
def _whole_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A name to make a folder under, which takes its place only when all of it is there."""
    new = temporary_beside(path)
    try:
        try:
            yield new
            if os.path.lexists(path):
                assert overwrite, f"{path} came into being meanwhile"
                old = temporary_beside(path)
                os.replace(path, old)
                os.replace(new, path)
                shutil.rmtree(old)
            else:
                os.replace(new, path)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror or error})") from error


def _decoder(source: Source, vae: Path | None, say: Callable[[str], None]) -> VaeFacts | None:
    """The VAE of what a network draws, where one is known."""
    if source.info is not None:
        return find_decoder(source.info, vae)
    place = vae or source.vae
    if place is None:
        return None
    facts = read_facts(place)
    if facts.latent_channels != source.published.config.channels:
        raise UserError(
            f"{place}: decodes latents of {facts.latent_channels} channels, and the network draws"
            f" {source.published.config.channels}"
        )
    if vae is None:
        say(f"{place}: decodes what the network draws")
    return facts


def _write_checkpoint(
    folder: Path, path: Path, published: PublishedWeights, decoder: VaeFacts | None, say: Callable[[str], None]
) -> None:
    """Write a checkpoint of ours. With one set of weights, that set is both what is trained and its average."""
    if published.objective is None:
        raise UserError(f"--objective: {published.origin} does not say it; give ddpm, rectified_flow or sit")
    config = published.config
    held = {}
    for which, state in (("ema", published.ema), ("weights", published.weights)):
        if state is not None:
            held[which] = read(state)
            note = check_position_embedding(held[which], config, published.origin, averaged=which == "ema")
            if note is not None:
                say(note)
    latents = None
    if decoder is not None:
        assert config.image_size is not None
        latents = LatentFacts(
            vae=str(decoder.path.absolute()),
            vae_sha256=decoder.sha256,
            scale=decoder.scale,
            shift=decoder.shift,
            pixels=config.image_size * decoder.reduction,
        ).model_dump()
    weights = held.get("weights", held.get("ema"))
    assert weights is not None
    try:
        write_weights_checkpoint(
            folder, config, published.objective, weights, held.get("ema"), published.class_names, latents
        )
    except (OSError, CheckpointException) as error:
        text = str(error).strip().splitlines()[-1]
        raise UserError(f"{path}: could not be written ({text})") from error
