"""Images of a network as a dataset: shards with provenance, labels and quality scores, by any number of processes.

    OUT/packing.json        what is written here (`data/making/ownership.py`); there first
        synthesis.json      what the images depend on
        work/chunks/*.npz   images as they were drawn, until their shards are there
        work/done/*.json    checksum and scores of each shard that is there, or is about to be
        NAME-00000.tar …    shards, each written once, under its name when it is whole
        samples.npz, preview.png, index.json    written last; `work` and the record are removed then

Image i is a function of (seed, i), its class is the i-th of the chosen ones in turn, and shard s holds the images
s·size …, so neither the number of processes nor where they were killed is in the bytes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.data.crew.making import Make, by_ranks
from ditmoe.data.making.ownership import (
    CLAIM,
    PLAN_FILE,
    WORK_FOLDER,
    clear,
    read_record,
    release,
    write_record,
)
from ditmoe.data.making.pack import encode
from ditmoe.data.making.preview import COLUMNS, ROWS, write_preview
from ditmoe.data.places.reader import Shard
from ditmoe.data.shards.images import BadImage
from ditmoe.data.shards.index import INDEX_FILE, DatasetIndex, ShardEntry, load_index, write_index
from ditmoe.data.shards.sample_table import SampleColumns, write_table
from ditmoe.data.shards.writer import PackedSample, write_shard
from ditmoe.data.storage.claims import Claims, list_folder
from ditmoe.data.storage.files import is_partial, make_folder, read_object, replacing
from ditmoe.data.storage.parts import CLAIMS_FOLDER, DamagedPart, Parts, Progress
from ditmoe.model.errors import UserError
from ditmoe.model.threads import threads_of
from ditmoe.sampling.chains.images import StateFile, find_posterior
from ditmoe.sampling.drawing.generate import generate
from ditmoe.sampling.evaluation.of_run import drawn_images
from ditmoe.sampling.jobs.alone import alone_at
from ditmoe.sampling.jobs.chunks import ChunkStore, DrawChunk, DrawnImages
from ditmoe.sampling.jobs.workers import Workers
from ditmoe.sampling.metrics.quality import Scorer, make_scorer
from ditmoe.sampling.network.load import LoadedModel, load_model, shared_folder
from ditmoe.sampling.noise_level.classifier import NoiseClassifier
from ditmoe.sampling.settings.names import NOT_FINITE
from ditmoe.sampling.synthesis.plan import Synthesis, check_out, read_plan

SHARDS_PER_ROUND: Final = 16
"""Shards whose images are on disk as chunks at a time."""


def finished(synthesis: Synthesis) -> DatasetIndex | None:
    """The index, when the whole dataset is there."""
    out = synthesis.out
    if read_plan(out) != synthesis.plan or not (out / INDEX_FILE).exists():
        return None
    index = load_index(out)
    if read_record(out) is not None:  # the last process was killed at the very end, or is just there
        with Claims(out).taken(CLAIM) as claim:
            if claim is not None:
                _tidy(out)
    return index


def drawer(synthesis: Synthesis, device: torch.device, *, several: bool = False) -> DrawChunk:
    """Draws chunks with the network, and of chains the noise-level classifier, which are loaded with the first.

    Args:
        several: other processes of the machine may draw too, and share the network's weights.
    """
    loaded: list[tuple[LoadedModel, NoiseClassifier | None]] = []
    options = synthesis.options

    def load() -> tuple[LoadedModel, NoiseClassifier | None]:
        sampler = synthesis.sampler
        model = load_model(
            synthesis.checkpoint,
            which=options.weights,
            device=device,
            precision=sampler.precision,
            vae=synthesis.vae,
            shared=shared_folder(synthesis.checkpoint) if several else None,
        )
        assert model.info is not None
        return model, find_posterior(model.info, device) if sampler.chains else None

    def draw(numbers: list[int], label_N: NDArray[np.int64]) -> DrawnImages:
        if not loaded:
            loaded.append(load())
        model, posterior = loaded[0]
        state_file = StateFile(
            synthesis.out / WORK_FOLDER / f"chains-{numbers[0]:08d}.safetensors", synthesis.fingerprint
        )
        labels, sampler, batch = torch.from_numpy(label_N), synthesis.sampler, synthesis.plan["batch"]
        return drawn_images(
            generate(model, labels, numbers, sampler, batch, posterior=posterior, state_file=state_file)
        )

    return draw


def synthesize(
    synthesis: Synthesis,
    draw: DrawChunk,
    workers: Workers | None = None,
    *,
    make: Make | None = None,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int], Progress] = lambda title, total: lambda done: None,
) -> DatasetIndex:
    """Make what is missing of the dataset; every process calls this with the same arguments.

    Args:
        draw: draws the images of a chunk from their numbers and labels.
        workers: this process among those at work; alone when left out.
        make: has parts made by a crew; None: these processes make them.
        log: takes lines to show (first process).
        progress: (title, total) → a function that is told the number done (first process).

    Raises:
        UserError: another process holds the folder; a file is damaged; the disk is full.
    """
    workers = workers or Workers()
    say: Callable[[str], None] = log if workers.first else lambda line: None
    show = progress if workers.first else lambda title, total: lambda done: None
    busy = f"{synthesis.out}: another process is writing to it"
    with alone_at(Claims(synthesis.out), CLAIM, workers, busy, lambda: _begin(synthesis)) as check:
        if not (synthesis.out / INDEX_FILE).exists():
            _make(synthesis, draw, workers, make or by_ranks(workers.rank, workers.ranks), say, show, check)
        # The index is there: the others may end before the first has tidied up.
        workers.on_first(lambda: _tidy(synthesis.out))
        return load_index(synthesis.out)


def _begin(synthesis: Synthesis) -> None:
    """Refuse a folder that is taken; clear one that is replaced; write the plan down."""
    out = synthesis.out
    check_out(synthesis)  # another process may have ended since
    if read_plan(out) == synthesis.plan:
        if read_record(out) is None:  # of a version that kept none
            write_record(out, synthesis.record)
        return
    clear(out, synthesis.record)
    with replacing(out / PLAN_FILE) as file:
        file.write(json.dumps(synthesis.plan, indent=1).encode() + b"\n")


def _make(
    synthesis: Synthesis,
    draw: DrawChunk,
    workers: Workers,
    make: Make,
    log: Callable[[str], None],
    progress: Callable[[str, int], Progress],
    check: Callable[[], None],
) -> None:
    scorer = None
    if synthesis.real is not None:
        options = synthesis.options
        show = progress("parts of the real images", synthesis.real.parts)
        scorer = make_scorer(
            options.score,
            synthesis.real,
            synthesis.plan["classes"],
            options.cache,
            workers.device,
            make,
            log,
            show,
        )
        described = scorer
        workers.on_first(lambda: check_scorer(synthesis, described))
    store = synthesis.store.drawn_by(draw, synthesis.labels_of)
    parts = shards_of(synthesis, store, scorer, workers.device)
    there = set(list_folder(synthesis.out))
    missing = [shard for shard in range(synthesis.shards) if parts.names[shard] not in there]
    rounds = [missing[i : i + SHARDS_PER_ROUND] for i in range(0, len(missing), SHARDS_PER_ROUND)]
    needed = [sorted({chunk for shard in some for chunk in synthesis.chunks_of(shard)}) for some in rounds]
    show_chunks = progress("chunks drawn", sum(map(len, needed)))
    drawn = 0
    for shards, chunks in zip(rounds, needed, strict=True):

        def say(done: int, before: int = drawn) -> None:
            show_chunks(before + done)

        make("drawn", store.parts, only=chunks, on_progress=say)
        drawn += len(chunks)
        # No shard is written while a process looks for what is missing, and no chunk removed while one reads it.
        workers.wait()
        make("shards", parts, only=shards)
        workers.wait()
        workers.on_first(lambda chunks=chunks: _remove_chunks(synthesis, chunks))  # type: ignore[misc]

    def finish() -> None:
        check()
        parts.result()

    workers.on_first(finish)


def check_scorer(synthesis: Synthesis, scorer: Scorer) -> None:
    """Write down what scores depend on, or see that it is what it was. UserError when it is not."""
    path = synthesis.out / WORK_FOLDER / "scorer.json"
    make_folder(path.parent)
    described = json.loads(json.dumps(dict(scorer.description)))
    if not path.exists():
        with replacing(path) as file:
            file.write(json.dumps(described).encode())
    elif read_object(path) != described:
        raise UserError(
            f"{synthesis.out}: was begun with another scoring network ({path.read_text()}, and now {described}): "
            f"{synthesis.options.cache} was changed since; delete the folder to begin again"
        )


class _Shard(NamedTuple):
    """The images of a shard, scored."""

    number: int
    number_N: NDArray[np.int64]
    """Of its images: those that are finite."""
    image_NHWC: NDArray[np.uint8]
    label_N: NDArray[np.int64]
    score_N: NDArray[np.float32] | None


def shards_of(
    synthesis: Synthesis, store: ChunkStore, scorer: Scorer | None, device: torch.device
) -> Parts[_Shard, dict[str, Any], None]:
    """The shards as parts. A shard's record is written first; the shard is there when it has its name."""

    def make(number: int) -> _Shard:
        numbers = synthesis.numbers(number)
        chunks = [store.read(chunk) for chunk in synthesis.chunks_of(number)]
        number_N = np.concatenate([chunk.number_N for chunk in chunks])
        rows = (numbers[0] <= number_N) & (number_N <= numbers[-1])
        image_NHWC, number_N = np.concatenate([chunk.image_NHWC for chunk in chunks])[rows], number_N[rows]
        if not len(number_N):
            raise UserError(f"none of the images {numbers[0]} to {numbers[-1]} is finite: {NOT_FINITE}")
        label_N = synthesis.labels_of(number_N.tolist())
        with threads_of(device):
            score_N = None if scorer is None else scorer(image_NHWC, label_N)
        return _Shard(number, number_N, image_NHWC, label_N, score_N)

    def write(shard: _Shard, file: BinaryIO) -> None:
        _write_shard(synthesis, shard, None if scorer is None else dict(scorer.description), file)

    names = [synthesis.shard_path(shard).name for shard in range(synthesis.shards)]
    return Parts(
        synthesis.out,
        names,
        make,
        write,
        lambda number: _read_record(synthesis, number),
        lambda records: _finish(synthesis, list(records)),
        synthesis.out / WORK_FOLDER / CLAIMS_FOLDER,
    )


def _write_shard(synthesis: Synthesis, shard: _Shard, scorer: dict[str, Any] | None, file: BinaryIO) -> None:
    """Write a shard to an open file, and its record."""
    numbers, plan = shard.number_N.tolist(), synthesis.plan
    provenance = {"checkpoint": plan["checkpoint"], "sampler": plan["sampler"], "batch": plan["batch"]}
    if scorer is not None:
        provenance["scorer"] = scorer

    def sample(place: int) -> PackedSample:
        label = int(shard.label_N[place])
        metadata = {
            "source": plan["checkpoint"]["name"],
            "number": numbers[place],
            "seed": plan["sampler"]["seed"],
            "label": label,
            "provenance": provenance,
        }
        if shard.score_N is not None:
            metadata["score"] = float(shard.score_N[place])
        try:
            data = encode(shard.image_NHWC[place], plan["format"])
        except BadImage as error:
            raise UserError(f"image {numbers[place]}: {error}") from error
        return PackedSample(f"{numbers[place]:08d}", plan["format"], data, label, metadata)

    entry = write_shard(file, synthesis.shard_path(shard.number).name, map(sample, range(len(numbers))))
    record = {
        "entry": entry.model_dump(),
        "shape": list(shard.image_NHWC.shape[1:]),
        "not_finite": sorted({*synthesis.numbers(shard.number)} - {*numbers}),
        "scores": None if shard.score_N is None else [float(score) for score in shard.score_N],
    }
    path = synthesis.record_path(shard.number)
    make_folder(path.parent)
    with replacing(path) as beside:
        beside.write(json.dumps(record).encode())


def _read_record(synthesis: Synthesis, shard: int) -> dict[str, Any]:
    """What was written down of a shard. DamagedPart when nothing was, or the shard is of another size."""
    path, record_path = synthesis.shard_path(shard), synthesis.record_path(shard)
    try:
        record: dict[str, Any] = json.loads(record_path.read_bytes())
        entry, size = ShardEntry.model_validate(record["entry"]), path.stat().st_size
        if (entry.file, entry.bytes) != (path.name, size) or not {
            "shape",
            "scores",
            "not_finite",
        } <= record.keys():
            raise ValueError(f"{size:,} bytes, and its record says {entry.bytes:,}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedPart(path, error) from error
    return record


def _remove_chunks(synthesis: Synthesis, chunks: list[int]) -> None:
    """Remove chunks whose images are all in shards."""
    size, there = synthesis.options.shard_samples, set(list_folder(synthesis.out))
    for chunk in chunks:
        numbers = synthesis.store.numbers(chunk)
        shards = range(numbers[0] // size, numbers[-1] // size + 1)
        if all(synthesis.shard_path(shard).name in there for shard in shards):
            synthesis.store.path(chunk).unlink(missing_ok=True)


def _finish(synthesis: Synthesis, records: list[dict[str, Any]]) -> None:
    """Write the table, the contact sheet and, last, the index."""
    out = synthesis.out
    not_finite = [number for record in records for number in record["not_finite"]]
    synthesis.store.check_finite(not_finite)
    label_N = synthesis.labels_of(sorted({*range(synthesis.count)} - {*not_finite})).astype(np.int32)
    scores = [score for record in records for score in record["scores"] or []]
    height, width, channels = records[0]["shape"]
    assert height == width
    index = DatasetIndex(
        name=synthesis.plan["name"],
        image_size=height,
        channels=channels,
        num_classes=len(synthesis.class_names),
        class_names=synthesis.class_names,
        samples=write_table(out, SampleColumns(label_N, np.array(scores, dtype=np.float32) if scores else None)),
        shards=tuple(ShardEntry.model_validate(record["entry"]) for record in records),
    )
    write_preview(out, index, _first_images(synthesis, index, label_N))
    write_index(out, index)


def _first_images(
    synthesis: Synthesis, index: DatasetIndex, label_N: NDArray[np.int32]
) -> dict[int, list[tuple[str, bytes]]]:
    """The first images of each class that the contact sheet has room for."""
    shown: dict[int, list[tuple[str, bytes]]] = {}
    wanted = np.sort(np.concatenate([np.flatnonzero(label_N == label)[:COLUMNS] for label in range(ROWS)]))
    extension = synthesis.plan["format"]
    for first, entry in zip(np.cumsum([0, *index.samples_per_shard]).tolist(), index.shards, strict=False):
        places = [int(place) for place in wanted if first <= place < first + entry.samples]
        if places:
            shard = Shard.at(synthesis.out / entry.file, entry)
            for place in places:
                image = shard.read(place - first, extension) or b""
                shown.setdefault(int(label_N[place]), []).append((extension, image))
            shard.close()
    return shown


def _tidy(out: Path) -> None:
    """Remove what was needed to resume, and what killed processes left."""
    record = read_record(out)
    for path in out.iterdir():
        if is_partial(path.name):
            path.unlink()
    if record is not None and record.names(f"{WORK_FOLDER}/"):
        shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
    release(out)
