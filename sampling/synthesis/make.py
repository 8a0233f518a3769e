"""Images of a network as a dataset: shards with provenance, labels and quality scores, by any number of processes.

    OUT/packing.json        what is written here (`data/making/ownership.py`); there first
        synthesis.json      what the images depend on
        work/chunks/*.npz   images as they were drawn, until their shards are there
        work/done/*.json    checksum and scores of each shard that is there
        NAME-00000.tar …    shards, each written once, under its name when it is whole
        samples.npz, preview.png, index.json    written last; `work` and the record are removed then

Image i is a function of (seed, i), its class is the i-th of the chosen ones in turn, and shard s holds the images
s·size …, so neither the number of processes nor where they were killed is in the bytes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.data.making.ownership import (
    LOCK_FILE,
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
from ditmoe.data.storage.files import is_partial, make_folder, replacing
from ditmoe.data.storage.sharing import Progress, make_missing, try_lock
from ditmoe.model.errors import UserError
from ditmoe.sampling.chains.images import StateFile
from ditmoe.sampling.drawing.generate import generate
from ditmoe.sampling.evaluation.of_run import drawn_images
from ditmoe.sampling.jobs.chunks import DrawChunk, DrawnImages
from ditmoe.sampling.jobs.workers import Workers
from ditmoe.sampling.metrics.quality import Scorer, make_scorer
from ditmoe.sampling.network.load import LoadedModel, load_model
from ditmoe.sampling.synthesis.plan import Synthesis, check_out, read_plan

SHARDS_PER_ROUND: Final = 16
"""Shards whose images are on disk as chunks at a time."""


def finished(synthesis: Synthesis) -> DatasetIndex | None:
    """The index, when the whole dataset is there."""
    out = synthesis.out
    if read_plan(out) != synthesis.plan or not (out / INDEX_FILE).exists():
        return None
    index = load_index(out)
    if (out / LOCK_FILE).exists():  # the last process was killed at the very end, or is just there
        with try_lock(out / LOCK_FILE) as held:
            if held:
                _tidy(out)
    return index


def drawer(synthesis: Synthesis, device: torch.device) -> DrawChunk:
    """Draws chunks with the network, which is loaded with the first."""
    loaded: list[LoadedModel] = []
    options = synthesis.options

    def draw(numbers: list[int], label_N: NDArray[np.int64]) -> DrawnImages:
        if not loaded:
            loaded.append(
                load_model(synthesis.checkpoint, which=options.weights, device=device, vae=synthesis.vae)
            )
        state_file = StateFile(
            synthesis.out / WORK_FOLDER / f"chains-{numbers[0]:08d}.safetensors", synthesis.fingerprint
        )
        labels, sampler = torch.from_numpy(label_N), synthesis.sampler
        return drawn_images(
            generate(loaded[0], labels, numbers, sampler, synthesis.plan["batch"], state_file=state_file)
        )

    return draw


def synthesize(
    synthesis: Synthesis,
    draw: DrawChunk,
    workers: Workers | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int], Progress] = lambda title, total: lambda done: None,
) -> DatasetIndex:
    """Make what is missing of the dataset; every process calls this with the same arguments.

    Args:
        draw: draws the images of a chunk from their numbers and labels.
        workers: this process among those at work; alone when left out.
        log: takes lines to show (first process).
        progress: (title, total) → a function that is told the number done (first process).

    Raises:
        UserError: another process holds the folder; a file is damaged; the disk is full.
    """
    workers = workers or Workers()
    say: Callable[[str], None] = log if workers.first else lambda line: None
    show = progress if workers.first else lambda title, total: lambda done: None
    make_folder(synthesis.out)
    lock = try_lock(synthesis.out / LOCK_FILE)
    held = lock.__enter__() if workers.first else True
    try:
        workers.on_first(lambda: _begin(synthesis, held))
        if not (synthesis.out / INDEX_FILE).exists():
            _make(synthesis, draw, workers, say, show)
        # The index is there: the others may end before the first has tidied up.
        workers.on_first(lambda: _tidy(synthesis.out))
        return load_index(synthesis.out)
    finally:
        if workers.first:
            lock.__exit__(None, None, None)


def _begin(synthesis: Synthesis, held: bool) -> None:
    """Refuse a folder that is held or taken; clear one that is replaced; write the plan down."""
    out = synthesis.out
    if not held:
        raise UserError(f"{out}: another process is writing to it; wait for it, or stop it")
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
    log: Callable[[str], None],
    progress: Callable[[str, int], Progress],
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
            workers,
            log,
            show,
        )
        described = scorer
        workers.on_first(lambda: _same_scorer(synthesis, described))
    store = synthesis.store
    missing = [shard for shard in range(synthesis.shards) if not synthesis.record_path(shard).exists()]
    rounds = [missing[i : i + SHARDS_PER_ROUND] for i in range(0, len(missing), SHARDS_PER_ROUND)]
    needed = [sorted({chunk for shard in some for chunk in synthesis.chunks_of(shard)}) for some in rounds]
    show_chunks = progress("chunks drawn", sum(map(len, needed)))
    drawn = 0
    for shards, chunks in zip(rounds, needed, strict=True):

        def make_chunk(place: int, chunks: list[int] = chunks) -> None:
            numbers = store.numbers(chunks[place])
            label_N = synthesis.labels_of(numbers)
            store.write(chunks[place], draw(numbers, label_N), label_N)

        def make_shard(place: int, shards: list[int] = shards) -> None:
            _write_shard(synthesis, shards[place], scorer)

        def say(done: int, before: int = drawn) -> None:
            show_chunks(before + done)

        make_missing(
            [store.path(chunk) for chunk in chunks],
            make_chunk,
            rank=workers.rank,
            ranks=workers.ranks,
            on_progress=say,
        )
        drawn += len(chunks)
        # No record is written while a process looks for what is missing, and no chunk removed while one reads it.
        workers.wait()
        make_missing(
            [synthesis.record_path(shard) for shard in shards], make_shard, rank=workers.rank, ranks=workers.ranks
        )
        workers.wait()
        workers.on_first(lambda chunks=chunks: _remove_chunks(synthesis, chunks))  # type: ignore[misc]
    workers.on_first(lambda: _finish(synthesis))


def _same_scorer(synthesis: Synthesis, scorer: Scorer) -> None:
    """Write down what scores depend on, or see that it is what it was. UserError when it is not."""
    path = synthesis.out / WORK_FOLDER / "scorer.json"
    make_folder(path.parent)
    described = json.loads(json.dumps(dict(scorer.description)))
    if not path.exists():
        with replacing(path) as file:
            file.write(json.dumps(described).encode())
    elif json.loads(path.read_bytes()) != described:
        raise UserError(
            f"{synthesis.out}: was begun with another scoring network ({path.read_text()}, and now {described}): "
            f"{synthesis.options.cache} was changed since; delete the folder to begin again"
        )


def _write_shard(synthesis: Synthesis, shard: int, scorer: Scorer | None) -> None:
    """Score and encode a shard's images from their chunks; write it, and that it is there."""
    numbers, store = synthesis.numbers(shard), synthesis.store
    chunks = [(chunk, store.read(chunk)) for chunk in synthesis.chunks_of(shard)]
    first = chunks[0][0] * store.size
    rows = slice(numbers[0] - first, numbers[-1] + 1 - first)
    image_NHWC = np.concatenate([chunk.image_NHWC for _, chunk in chunks])[rows]
    label_N = synthesis.labels_of(numbers)
    score_N = None if scorer is None else scorer(image_NHWC, label_N)
    plan = synthesis.plan
    provenance = {"checkpoint": plan["checkpoint"], "sampler": plan["sampler"], "batch": plan["batch"]}
    if scorer is not None:
        provenance["scorer"] = dict(scorer.description)

    def sample(place: int) -> PackedSample:
        metadata = {
            "source": plan["checkpoint"]["name"],
            "number": numbers[place],
            "seed": plan["sampler"]["seed"],
            "label": int(label_N[place]),
            "provenance": provenance,
        }
        if score_N is not None:
            metadata["score"] = float(score_N[place])
        try:
            data = encode(image_NHWC[place], plan["format"])
        except BadImage as error:
            raise UserError(f"image {numbers[place]}: {error}") from error
        return PackedSample(f"{numbers[place]:08d}", plan["format"], data, int(label_N[place]), metadata)

    path = synthesis.shard_path(shard)
    with replacing(path) as file:
        entry = write_shard(file, path.name, map(sample, range(len(numbers))))
    record = {
        "entry": entry.model_dump(),
        "shape": list(image_NHWC.shape[1:]),
        "scores": None if score_N is None else [float(score) for score in score_N],
    }
    make_folder(synthesis.record_path(shard).parent)
    with replacing(synthesis.record_path(shard)) as file:
        file.write(json.dumps(record).encode())


def _remove_chunks(synthesis: Synthesis, chunks: list[int]) -> None:
    """Remove chunks whose images are all in shards."""
    size = synthesis.options.shard_samples
    for chunk in chunks:
        numbers = synthesis.store.numbers(chunk)
        shards = range(numbers[0] // size, numbers[-1] // size + 1)
        if all(synthesis.record_path(shard).exists() for shard in shards):
            synthesis.store.path(chunk).unlink(missing_ok=True)


def _finish(synthesis: Synthesis) -> None:
    """Write the table, the contact sheet and, last, the index."""
    out = synthesis.out
    records = [json.loads(synthesis.record_path(shard).read_bytes()) for shard in range(synthesis.shards)]
    label_N = synthesis.labels_of(list(range(synthesis.count))).astype(np.int32)
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
    extension, size = synthesis.plan["format"], synthesis.options.shard_samples
    for number, entry in enumerate(index.shards):
        places = [int(place) for place in wanted if place // size == number]
        if places:
            shard = Shard.at(synthesis.out / entry.file, entry)
            for place in places:
                image = shard.read(place - number * size, extension) or b""
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
