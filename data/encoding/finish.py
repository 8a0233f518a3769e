"""The end of an encode: the table of samples, the contact sheet, and what the index says."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditmoe.data.encoding.folder import ShardMark
from ditmoe.data.encoding.plan import Encoding
from ditmoe.data.encoding.vae import Vae
from ditmoe.data.making.preview import COLUMNS, PREVIEW_FILE, ROWS, draw_contact_sheet, write_png
from ditmoe.data.places.reader import Shard
from ditmoe.data.shards.decode import BadSample
from ditmoe.data.shards.images import ImageArray, to_uint8
from ditmoe.data.shards.index import DatasetIndex
from ditmoe.data.shards.sample_table import SampleColumns, write_table
from ditmoe.model.errors import UserError


def finish(encoding: Encoding, vae: Vae, marks: Sequence[ShardMark]) -> DatasetIndex:
    """Write the table of samples and the contact sheet; the index, which is to be written last.

    Args:
        encoding: what was encoded.
        vae: decodes what the contact sheet shows.
        marks: of its shards.

    UserError where what was encoded is not what the marks, or the source's own table of samples, say.
    """
    out, source = encoding.folder.path, encoding.index
    left_out = encoding.new_left_out()
    kept = []
    for members, mark in zip(encoding.members, marks, strict=True):
        if mark.left_out:
            left_out.add_lines(len(mark.left_out), list(mark.left_out.values()))
        kept.append(~np.isin(members, list(mark.left_out)))
    kept_N = np.concatenate(kept)
    label_N = np.array([label for mark in marks for label in mark.labels], dtype=np.int32)
    score_N = None
    if encoding.samples is not None:
        used = np.flatnonzero(encoding.samples.label_N >= 0)[kept_N]
        expected_N = encoding.samples.label_N[used]
        if not np.array_equal(expected_N, label_N):
            number = int((expected_N != label_N).nonzero()[0][0])
            raise UserError(
                f"{encoding.source}: sample {int(used[number]):,} has label {label_N[number]}, and"
                f" the table of samples says {expected_N[number]}: table and shards are not of one dataset"
            )
        score_N = None if encoding.samples.score_N is None else encoding.samples.score_N[used]
    index = DatasetIndex(
        name=source.name,
        image_size=source.image_size // encoding.vae.reduction,
        channels=encoding.vae.latent_channels,
        num_classes=source.num_classes,
        class_names=source.class_names,
        latents=encoding.latents,
        samples=write_table(out, SampleColumns(label_N, score_N)),
        shards=tuple(mark.entry for mark in marks),
    )
    write_png(draw_contact_sheet(index.class_names, _first_of_class(out, index, label_N, vae)), out / PREVIEW_FILE)
    return index


def _first_of_class(
    folder: Path, index: DatasetIndex, label_N: np.ndarray, vae: Vae
) -> dict[int, list[ImageArray]]:
    """What the contact sheet shows, decoded from the means that were written."""
    starts = np.cumsum([0, *index.samples_per_shard])
    latents: dict[int, list[Tensor]] = {label: [] for label in range(min(ROWS, index.num_classes))}
    wanted = sorted((int(n), label) for label in latents for n in (label_N == label).nonzero()[0][:COLUMNS])
    for entry, first, end in zip(index.shards, starts, starts[1:], strict=False):
        here = [(number - int(first), label) for number, label in wanted if first <= number < end]
        if not here:
            continue
        shard = Shard.at(folder / entry.file, entry)
        try:
            for member, label in here:
                latents[label].append(_scaled_mean(shard, member, index))
        finally:
            shard.close()
    return {label: _decoded(torch.stack(found), vae) for label, found in latents.items() if found}


def _scaled_mean(shard: Shard, member: int, index: DatasetIndex) -> Tensor:
    """The mean of one latent as a network sees it, `[C, H, W]`."""
    assert index.latents is not None
    try:
        mean_CHW, _ = shard.sample(member).latent(index)
    except BadSample as error:
        raise UserError(f"{shard.where(member)}: {error}") from error
    return (torch.from_numpy(mean_CHW) - index.latents.shift) * index.latents.scale


def _decoded(latent_BCHW: Tensor, vae: Vae) -> list[ImageArray]:
    """Images, each `[H, W, C]`."""
    image_BHWC = to_uint8(vae.decode(latent_BCHW)).cpu().permute(0, 2, 3, 1).contiguous()
    return list(image_BHWC.numpy())
