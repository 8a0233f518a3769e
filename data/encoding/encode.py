"""Encoding: a folder of images becomes a folder of latents, shard for shard, sample for sample.

The bytes are a function of the images, the VAE and the settings. Batches are filled up, because a matrix product
of another shape may round otherwise; for the same reason a CPU takes one image at a time, in one thread: it gains
nothing from batches, and the machine's cores belong to as many processes.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ditmoe.data.crew.making import Make, by_ranks
from ditmoe.data.encoding.finish import finish
from ditmoe.data.encoding.folder import ShardMark
from ditmoe.data.encoding.plan import EncodeSettings, Encoding
from ditmoe.data.encoding.vae import Vae, load_vae
from ditmoe.data.places.reader import Shard
from ditmoe.data.shards.decode import LABEL_EXTENSION, METADATA_EXTENSION, BadSample
from ditmoe.data.shards.images import ImageArray
from ditmoe.data.shards.index import INDEX_FILE, DatasetIndex, load_index, put_index
from ditmoe.data.shards.latents import MIRRORED, PLAIN, encode_latent
from ditmoe.data.shards.names import is_plain_key
from ditmoe.data.shards.writer import ReadySample, write_shard
from ditmoe.data.storage.claims import list_folder
from ditmoe.data.storage.parts import DamagedPart, Parts
from ditmoe.model.errors import UserError
from ditmoe.model.randomness import uniform
from ditmoe.model.threads import threads_of


def encode(
    encoding: Encoding,
    device: torch.device,
    *,
    rank: int = 0,
    ranks: int = 1,
    make: Make | None = None,
    on_progress: Callable[[int], None] = lambda images: None,
    log: Callable[[str], None] = lambda line: None,
) -> DatasetIndex:
    """Encode what is missing, or have it encoded, until all is there and the index is written.

    Args:
        encoding: of which `folder.begin` was called.
        device: where the VAE computes.
        rank: this process among `ranks`; any number of further processes may help.
        make: has shards and index made by a crew; None: these processes make them.
        on_progress: called with the number of images that are done, as far as this process knows.
        log: takes a line for each image that this process leaves out.

    Raises:
        UserError: a sample cannot be used, the folder is taken, or the disk is full; what was finished is kept.
    """
    work = Work(encoding, device, on_progress, log)
    folder, shards = encoding.folder, work.shards
    with folder.joined():
        if not folder.finished:
            there = set(list_folder(folder.path))
            for part in range(rank, len(shards.names), ranks):
                if shards.names[part] not in there:
                    continue
                if make is None:
                    shards.load(part)
                else:
                    _let_go_of_damaged(shards, part)
            made = make or by_ranks(rank, ranks)
            made("shards", shards, on_progress=work.count_finished)
            made("index", work.index)  # one process writes it; all wait here, for that one may die
    return load_index(folder.path)


def _let_go_of_damaged(shards: Parts[int, ShardMark, list[ShardMark]], part: int) -> None:
    """Remove a shard that is not whole, for another process to make it anew."""
    try:
        shards.read(part)
    except DamagedPart as error:
        print(f"{error}: this is done now", file=sys.stderr, flush=True)
        shards.path(part).unlink(missing_ok=True)


def images_at_once(settings: EncodeSettings, device: torch.device) -> int:
    """Images that pass through the VAE together."""
    return 1 if device.type == "cpu" else settings.batch


class _Read(NamedTuple):
    """A batch of images, read ahead."""

    members: list[int]
    image_BHWC: Tensor
    labels: list[int]
    metadata: list[bytes | None]


class Work:
    """One process's share."""

    def __init__(
        self,
        encoding: Encoding,
        device: torch.device,
        on_progress: Callable[[int], None] = lambda images: None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """As `encode`."""
        self._encoding = encoding
        self._settings = encoding.settings
        self._index = encoding.index
        self.folder = encoding.folder
        self._device = device
        self._batch = images_at_once(encoding.settings, device)
        self._loaded: Vae | None = None
        self._on_progress = on_progress
        self._finished_images = 0
        self._left_out = encoding.new_left_out()
        self._log = log

    @property
    def vae(self) -> Vae:
        """The VAE, loaded when this process first has something to encode."""
        if self._loaded is None:
            self._loaded = load_vae(self._encoding.vae, self._device)
        return self._loaded

    @property
    def shards(self) -> Parts[int, ShardMark, list[ShardMark]]:
        """The shards as parts: a shard's mark is written first, then the shard takes its name."""
        names = [entry.file for entry in self._index.shards]
        return Parts(
            self.folder.path,
            names,
            lambda number: number,  # a shard is written as it is encoded: it need not fit into memory
            self.encode_shard,
            lambda number: self.folder.read_mark(names[number]),
            list,
            self.folder.claims.folder,
            [len(members) for members in self._encoding.members],
        )

    @property
    def index(self) -> Parts[DatasetIndex, DatasetIndex, None]:
        """The index as the only part of what follows from the shards."""
        return Parts(
            self.folder.path,
            [INDEX_FILE],
            lambda _: self._finish(),
            put_index,
            lambda _: load_index(self.folder.path),
            lambda found: None,
            self.folder.claims.folder,
        )

    def count_finished(self, images: int) -> None:
        """Take down how many images are in shards that are there, and tell."""
        self._finished_images = images
        self._on_progress(images)

    def _finish(self) -> DatasetIndex:
        with threads_of(self._device):
            return finish(self._encoding, self.vae, self.shards.result())

    def encode_shard(self, number: int, file: BinaryIO) -> None:
        """Encode one shard to an open file, and write its mark."""
        with threads_of(self._device):
            self._encode_shard(number, file)

    def _encode_shard(self, number: int, file: BinaryIO) -> None:
        entry = self._index.shards[number]
        shard = Shard.at(self._encoding.source / entry.file, entry)
        labels: list[int] = []
        left_out: dict[int, str] = {}
        try:
            samples = self._samples(shard, number, labels, left_out)
            first = next(samples, None)
            if first is None:
                raise UserError(
                    f"{shard.name}: none of its images can be used, such as {next(iter(left_out.values()))}; "
                    "index the folder again without it"
                )
            written = write_shard(file, entry.file, chain([first], samples))
        finally:
            shard.close()
        self.folder.write_mark(
            ShardMark(settings=self.folder.fingerprint, entry=written, labels=tuple(labels), left_out=left_out)
        )

    def _samples(
        self, shard: Shard, number: int, labels: list[int], left_out: dict[int, str]
    ) -> Iterator[ReadySample]:
        """The members of each sample, in the shard's order.

        `labels` takes their labels, and `left_out` the images that cannot be used.
        """
        first = sum(self._index.samples_per_shard[:number])
        usable = self._encoding.members[number].tolist()
        keys_stay = all(map(is_plain_key, shard.keys))  # else numbers in their place: keys of others may be paths
        batches = [usable[start : start + self._batch] for start in range(0, len(usable), self._batch)]
        for read in _one_ahead(lambda members: self._read(shard, members, left_out), batches):
            if not read.members:
                continue
            views = self._views(read, first)
            for row, member in enumerate(read.members):
                members: dict[str, bytes] = {}
                for stem, (mean_BCHW, std_BCHW) in views.items():
                    try:
                        data = encode_latent(
                            mean_BCHW[row], std_BCHW[row], self._settings.dtype, self._settings.format
                        )
                    except BadSample as error:
                        raise UserError(f"{shard.where(member)}: {error}; expected another --dtype") from error
                    members[f"{stem}.{self._settings.format}"] = data
                members[LABEL_EXTENSION] = str(read.labels[row]).encode()
                metadata = read.metadata[row]
                if metadata is not None:
                    members[METADATA_EXTENSION] = metadata
                key = shard.keys[member]
                yield ReadySample(key if keys_stay else f"{first + member:08d}", members)
            labels += read.labels
            self._on_progress(self._finished_images + len(labels))

    def _views(self, read: _Read, first: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Stem of the member → mean and standard deviation, `[B, C, H, W]`, of each view of the batch."""
        image_BHWC = read.image_BHWC
        if self._settings.flips == "drawn":
            numbers = [first + member for member in read.members]
            heads_B = uniform(self._settings.seed, "data/encode flip", numbers) < 0.5
            image_BHWC = torch.where(heads_B[:, None, None, None], image_BHWC.flip(2), image_BHWC)
        views = {PLAIN: self._moments(image_BHWC)}
        if self._settings.flips == "both":
            views[MIRRORED] = self._moments(image_BHWC.flip(2))
        return views

    def _moments(self, image_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        missing = self._batch - len(image_BHWC)
        filled_BHWC = torch.cat([image_BHWC, image_BHWC[-1:].expand(missing, -1, -1, -1)])
        mean_BCHW, logvar_BCHW = self.vae.encode_moments(filled_BHWC)
        return mean_BCHW[: len(image_BHWC)], (0.5 * logvar_BCHW[: len(image_BHWC)]).exp()

    def _read(self, shard: Shard, members: list[int], left_out: dict[int, str]) -> _Read:
        """Images, labels and metadata. UserError naming shard and key when one cannot be used or left out."""
        kept: list[int] = []
        images: list[ImageArray] = []
        labels: list[int] = []
        metadata: list[bytes | None] = []
        for member in members:
            try:
                sample = shard.sample(member)
                image, label, facts = sample.image(self._index), sample.label(self._index), sample.metadata()
            except BadSample as error:
                self._left_out.add(shard.where(member), str(error))
                left_out[member] = f"{shard.where(member)}: {error}"
                self._log(f"left out: {left_out[member]}")
                continue
            kept.append(member)
            images.append(image)
            labels.append(label)
            metadata.append(facts)
        image_BHWC = torch.from_numpy(np.stack(images)) if images else torch.empty(0)
        return _Read(kept, image_BHWC, labels, metadata)


def _one_ahead(read: Callable[[list[int]], _Read], batches: list[list[int]]) -> Iterator[_Read]:
    """Read in a thread, one batch ahead of what is encoded."""
    with ThreadPoolExecutor(1, "read") as thread:
        pending = [thread.submit(read, members) for members in batches[:1]]
        for members in batches[1:]:
            ready = pending.pop().result()
            pending.append(thread.submit(read, members))
            yield ready
        for last in pending:
            yield last.result()
