"""Verification: every shard and every sample of a packed folder is read, and every problem is listed."""

import hashlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.shards.decode import BadSample
from ditmoe.data.shards.index import INDEX_FILE, DatasetIndex, ShardEntry, load_index
from ditmoe.data.shards.members import Contents
from ditmoe.data.shards.sample import RawSample
from ditmoe.data.shards.sample_table import TABLE_FILE, read_table
from ditmoe.data.shards.tar_scan import scan
from ditmoe.data.storage.files import open_regular
from ditmoe.data.storage.progress import track
from ditmoe.data.storage.workers import in_order
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted


class ShardReport(NamedTuple):
    """What was found in one shard."""

    problems: list[str]
    """One line each, with shard and, where it concerns one, the sample's key."""
    labels: Counter[int]
    """How many usable labels of each class."""


@dataclass
class Report:
    """What was found in a folder."""

    index: DatasetIndex
    problems: list[str] = field(default_factory=list)
    """One line each; none: the folder is good."""
    labels: Counter[int] = field(default_factory=Counter)
    """Images of each class."""

    def histogram(self) -> list[str]:
        """Images per class, a line each."""
        largest = max(self.labels.values(), default=0)
        width = max(len(name) for name in self.index.class_names)
        return [
            f"{label:5d}  {name:<{width}}  {self.labels[label]:9,d}  "
            + "█" * (round(30 * self.labels[label] / largest) if largest else 0)
            for label, name in enumerate(self.index.class_names)
        ]


def verify(folder: Path, workers: int = 0, index_folder: Path | None = None) -> Report:
    """Read everything in a packed folder; its index may lie in another one.

    UserError when there is no index, as then nothing is known of it.
    """
    index_folder = index_folder or folder
    index = load_index(index_folder)
    report = Report(index)
    table_problems = []
    try:
        table = read_table(index_folder, index)
    except UserError as error:
        table, table_problems = None, [str(error)]
    listed = {*index.left_out, *(shard.file for shard in index.shards)}
    ends = np.cumsum(index.samples_per_shard)[:-1]
    labels = [None] * len(index.shards) if table is None else np.split(table.label_N, ends)
    check = partial(verify_shard, folder, index)
    checked = in_order(check, list(zip(index.shards, labels, strict=True)), workers)
    for shard in track(checked, len(index.shards), "verifying", "shards"):
        report.problems += shard.problems
        report.labels += shard.labels
    report.problems += [
        f"{path}: extra: {INDEX_FILE} does not list it"
        for path in sorted(folder.glob("*.tar"))
        if path.name not in listed
    ]
    report.problems += table_problems
    return report


def verify_shard(
    folder: Path, index: DatasetIndex, entry_labels: tuple[ShardEntry, NDArray[np.int32] | None]
) -> ShardReport:
    """Check one shard's file, and every sample in it that can still be reached.

    With labels `[samples]` of the table, those of the shard must be equal; samples that have −1 are left out.
    """
    entry, label_N = entry_labels
    path = folder / entry.file
    report = ShardReport([], Counter())
    try:
        size, sha256 = _checksum(path)
        contents = scan(path)
    except FileNotFoundError:
        report.problems.append(f"{path}: missing, but {INDEX_FILE} lists it")
        return report
    except OSError as error:
        report.problems.append(f"{path}: could not be read: {error.strerror or error}")
        return report
    if size != entry.bytes:
        kind = "truncated" if size < entry.bytes else "too long"
        report.problems.append(f"{path}: {kind}: {size:,} bytes, and {INDEX_FILE} says {entry.bytes:,}")
    elif sha256 != entry.sha256:
        report.problems.append(
            f"{path}: checksum mismatch: sha256 {sha256[:12]}…, and {INDEX_FILE} says {entry.sha256[:12]}…"
        )
    if contents.problem is not None:
        report.problems.append(f"{path}: {contents.problem}")
    if len(contents.keys) != entry.samples:
        report.problems.append(
            f"{path}: {counted(len(contents.keys), 'sample')}, and {INDEX_FILE} says {entry.samples:,}"
        )
        label_N = None
    _verify_samples(path, index, contents, label_N, report)
    return report


def _checksum(path: Path) -> tuple[int, str]:
    with open_regular(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256


def _verify_samples(
    path: Path, index: DatasetIndex, contents: Contents, label_N: NDArray[np.int32] | None, report: ShardReport
) -> None:
    with open(path, "rb") as file:
        for number, (key, extents) in enumerate(zip(contents.keys, contents.members, strict=True)):
            if label_N is not None and label_N[number] < 0:
                continue
            members = {}
            for extension, extent in extents.items():
                file.seek(extent.offset)
                members[extension] = file.read(extent.size)
            report.problems.extend(f"{path}, sample {key}: {problem}" for problem in _problems(members, index))
            with suppress(BadSample):  # already among the problems
                label = RawSample.of(members).label(index)
                report.labels[label] += 1
                if label_N is not None and label != label_N[number]:
                    report.problems.append(
                        f"{path}, sample {key}: label {label}, and {TABLE_FILE} says {label_N[number]}"
                    )


def _problems(members: dict[str, bytes], index: DatasetIndex) -> list[str]:
    """All that is wrong with one sample."""

    sample = RawSample.of(members)
    views: list[Callable[[], object]] = [partial(sample.image, index)]
    if index.latents is not None:
        both = (False, True)[: 1 + (index.latents.flips == "both")]
        views = [partial(sample.latent, index, mirrored) for mirrored in both]
    problems = []
    checks: list[Callable[[], object]] = [*views, partial(sample.label, index), sample.metadata]
    for check in checks:
        try:
            check()
        except BadSample as error:
            problems.append(str(error))
    return problems
