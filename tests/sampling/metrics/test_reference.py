"""Images that others are compared with are those that the run was trained on, wherever they lie."""

import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from ditmoe.data.making.foreign import ForeignSettings, index_foreign
from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.data.shards.index import load_index, write_index
from ditmoe.data.shards.sample_table import SampleColumns, read_table, write_table
from ditmoe.data.shards.writer import ShardLimits
from ditmoe.data.stream.config import DataConfig, SourceConfig
from ditmoe.data.stream.dataset import Dataset, open_dataset
from ditmoe.data.stream.remembered import kept_in_checkpoint
from ditmoe.data.stream.stream import dealing_of, open_stream
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import CheckpointInfo, checkpoint_path, read_info
from ditmoe.parallel.ranks import ThisProcess
from ditmoe.sampling.metrics import decoding
from ditmoe.sampling.metrics import reference as reference_module
from ditmoe.sampling.metrics.decoding import decoding_processes
from ditmoe.sampling.metrics.real_statistics import real_statistics
from ditmoe.sampling.metrics.reference import ReferenceImages, open_reference, reference_of_run
from tests.data.making.foreign_tars import picture, write_tar
from tests.sampling.small_run import images_of, write_run

SEED = 5


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """60 digits in 4 shards, with scores."""
    folder = tmp_path / "shards"
    pack(open_source("digits", seed=0), folder, PackSettings(count=60, limits=ShardLimits(samples=15)))
    index = load_index(folder)
    table = read_table(folder, index)
    assert table is not None
    scored = SampleColumns(table.label_N, (np.arange(60) % 10 / 10).astype(np.float32))
    write_index(folder, index.model_copy(update={"samples": write_table(folder, scored)}))
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> CheckpointInfo:
    return read_info(checkpoint_path(write_run(tmp_path_factory.mktemp("run")), 0))


@pytest.fixture
def trained(untrained: CheckpointInfo) -> Callable[..., tuple[CheckpointInfo, Dataset]]:
    """What a checkpoint says of a run on a source, and the data as training read it."""

    def train(path: Path | str, **settings: Any) -> tuple[CheckpointInfo, Dataset]:
        config = DataConfig.model_validate({"sources": [{"path": str(path), **settings}], "workers": 0})
        dataset = open_dataset(config, SEED)
        kept = kept_in_checkpoint({"data": config.model_dump(mode="json"), "seed": SEED})
        kept = json.loads(json.dumps(kept))
        return replace(
            untrained, config=untrained.config | kept, dataset=untrained.dataset | dataset.facts
        ), dataset

    return train


def seen_in_training(dataset: Dataset) -> list[tuple[int, bytes]]:
    """Label and pixels of every sample of one epoch, sorted."""
    total = dataset.sources[0].total
    stream = open_stream(dataset, dealing_of(dataset.config, start=0, micro_batch=total, ranks=1))
    batch = next(stream)
    stream.close()
    images = batch.image_BCHW.permute(0, 2, 3, 1).contiguous().numpy()
    return sorted((int(label), image.tobytes()) for label, image in zip(batch.label_B, images, strict=True))


def seen_in(reference: ReferenceImages) -> list[tuple[int, bytes]]:
    batches = list(reference.read_all(7))
    return sorted(
        (int(label), image.tobytes())
        for batch in batches
        for label, image in zip(batch.label_N, batch.image_NHWC, strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_per_class": 3},
        {"min_score": 0.5},
        {"classes": {"3": None, "4": "5"}},
        {"max_samples": 11, "classes": {"0": 9}},
    ],
    ids=str,
)
def test_a_run_is_compared_with_what_it_was_trained_on(
    trained: Callable[..., tuple[CheckpointInfo, Dataset]], shards: Path, settings: dict[str, Any]
) -> None:
    info, dataset = trained(shards, **settings)
    reference = reference_of_run(info)
    assert seen_in(reference) == seen_in_training(dataset)
    assert reference.count == dataset.sources[0].total
    assert reference.facts(reference.new_left_out())["choice"] == settings
    # Shards that have moved are the run's own still; others are taken whole.
    moved = shutil.copytree(shards, shards.parent / "moved")
    assert seen_in(reference_of_run(info, moved)) == seen_in(reference)
    assert reference_of_run(info, moved).fingerprint == reference.fingerprint
    pack(open_source("digits", seed=0), shards.parent / "others", PackSettings(count=40, seed=1))
    assert reference_of_run(info, shards.parent / "others").count == 40
    assert settings == {} or reference.fingerprint != images_of(shards).fingerprint


def test_the_same_tars_indexed_otherwise_are_other_images(tmp_path: Path) -> None:
    labels = [b'{"a": 0, "b": 1}', b'{"a": 1, "b": 0}']
    samples = [(f"{n}", {"png": picture("PNG", (16, 16), shade=60 + n), "json": labels[n % 2]}) for n in range(8)]
    write_tar(tmp_path / "in/0.tar", samples)

    def indexed(out: str, **settings: Any) -> ReferenceImages:
        settings = {"label": "json:a", "image_size": 16, "out": tmp_path / out, **settings}
        index_foreign(tmp_path / "in", ForeignSettings(**settings))
        return open_reference(SourceConfig(path=str(tmp_path / "in"), index=tmp_path / out / "index.json"))

    first = indexed("first")
    others = [indexed("size", image_size=8), indexed("label", label="json:b"), indexed("grey", channels=1)]
    found = {reference.fingerprint for reference in (first, *others)}
    assert len(found) == 4 and len({reference.index.fingerprint for reference in (first, *others)}) == 1
    assert indexed("again").fingerprint == first.fingerprint
    assert [label for label, _ in seen_in(first)] == [label for label, _ in seen_in(others[1])]
    assert seen_in(first) != seen_in(others[1])
    assert {batch.image_NHWC.shape[1:] for batch in others[0].read_all(8)} == {(8, 8, 3)}
    # A table that was written anew, with one sample left out, is another choice.
    index = first.index
    table = read_table(tmp_path / "first", index)
    assert table is not None
    fewer = SampleColumns(np.where(np.arange(8) == 3, -1, table.label_N).astype(np.int32), None)
    write_index(tmp_path / "first", index.model_copy(update={"samples": write_table(tmp_path / "first", fewer)}))
    reopened = open_reference(SourceConfig(path=str(tmp_path / "in"), index=tmp_path / "first" / "index.json"))
    assert reopened.count == 7 and reopened.fingerprint != first.fingerprint


def test_images_are_the_same_wherever_they_lie(
    trained: Callable[..., tuple[CheckpointInfo, Dataset]],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = images_of(shards)
    # A relative path, looked at from another directory; an index elsewhere; an object store; a command.
    monkeypatch.chdir(tmp_path)
    info, _ = trained("shards")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tars").mkdir()
    for path in shards.iterdir():
        shutil.copy(path, tmp_path / ("tars" if path.suffix == ".tar" else "elsewhere"))
    apart, _ = trained("tars", index="elsewhere/index.json")
    store = fsspec.filesystem("memory")
    for path in shards.iterdir():
        store.pipe(f"/reference/{path.name}", path.read_bytes())
    remote, _ = trained("memory://reference")
    piped, _ = trained(f"pipe:cat {shards}/{{}}")
    monkeypatch.chdir("/")
    for reference in (
        reference_of_run(info),
        reference_of_run(apart),
        reference_of_run(remote),
        reference_of_run(piped, f"pipe:cat {shards}/{{}}"),
        reference_of_run(info, tmp_path / "tars", tmp_path / "elsewhere"),
    ):
        assert seen_in(reference) == seen_in(expected) and reference.fingerprint == expected.fingerprint
    with pytest.raises(
        UserError, match=r"was trained on pipe:cat …: a command, .*; name the source with --reference"
    ):
        reference_of_run(piped, option="--reference")


def test_other_data_in_the_place_of_the_runs_is_refused(
    trained: Callable[..., tuple[CheckpointInfo, Dataset]], shards: Path
) -> None:
    info, _ = trained(shards)
    shutil.rmtree(shards)
    pack(open_source("digits", seed=0), shards, PackSettings(count=60, seed=1))
    with pytest.raises(
        UserError, match=r"shards: is other data than .* was trained on \(another choice of samples, sh"
    ):
        reference_of_run(info)
    assert reference_of_run(info, shards).count == 60, "named, it is what the user wants"


def damage_first_image(path: Path) -> None:
    """Spoil the first image of a tar, and neither its size nor a header."""
    path.write_bytes(path.read_bytes().replace(b"\x89PNG", b"\x00PNG", 1))


def test_what_cannot_be_used_is_left_out_by_the_runs_policy_and_named(
    trained: Callable[..., tuple[CheckpointInfo, Dataset]], shards: Path
) -> None:
    whole = images_of(shards)
    damage_first_image(shards / whole.index.shards[1].file)
    with pytest.raises(
        UserError,
        match=r"-00001\.tar, sample \d+: not a readable PNG image.*--on-error skip leaves out.*--check-images",
    ):
        list(whole.read_all(8))
    info, _ = trained(shards, on_error="skip", skip_budget=16)
    reference = reference_of_run(info)
    left_out = reference.new_left_out()
    batches = list(reference.read_all(8, left_out))
    assert sum(len(batch.label_N) for batch in batches) == 59 and left_out.count == 1
    numbers = np.concatenate([batch.number_N for batch in batches]).tolist()
    assert numbers == [number for number in range(60) if number != 15]
    assert "-00001.tar, sample" in left_out.lines[0] and "not a readable PNG" in left_out.lines[0]
    with pytest.raises(UserError, match="--on-error skip leaves out"):  # also of what another one kept in a cache
        whole.new_left_out().add_lines(left_out.count, left_out.lines)
    facts = reference.facts(left_out)
    assert facts["images"] == 59 and facts["left_out"] == {"samples": 1, "shards": [], "first": left_out.lines}
    # A shard that is gone, too: its images count, and they are others then.
    (shards / whole.index.shards[3].file).unlink()
    with pytest.raises(UserError, match=r"-00003\.tar: No such file"):
        images_of(shards)
    fewer = reference_of_run(info)
    left_out = fewer.new_left_out()
    assert sum(len(batch.label_N) for batch in fewer.read_all(8, left_out)) == 44
    assert fewer.facts(left_out)["left_out"]["samples"] == 16 and fewer.facts(left_out)["images"] == 44
    assert fewer.fingerprint != reference.fingerprint
    (shards / whole.index.shards[2].file).unlink()
    with pytest.raises(UserError, match="30 samples cannot be used, and skip_budget is 16"):
        reference_of_run(info)


def test_a_remote_shard_that_cannot_be_had_is_an_error_whatever_the_policy(
    trained: Callable[..., tuple[CheckpointInfo, Dataset]], shards: Path
) -> None:
    store = fsspec.filesystem("memory")
    for path in shards.iterdir():
        store.pipe(f"/lost/{path.name}", path.read_bytes())
    info, _ = trained("memory://lost", on_error="skip")
    store.rm(f"/lost/{load_index(shards).shards[2].file}")
    with pytest.raises(UserError, match=r"memory://lost/.*-00002\.tar: no such file"):
        list(reference_of_run(info).read_all(8))


def damaged_copy(shards: Path, out: Path) -> Path:
    """The shards with three pictures that cannot be decoded, and a shard with a damaged header."""
    shutil.copytree(shards, out)
    index = load_index(out)
    names = [entry.file for entry in index.shards]
    for name, places in ((names[0], (3, 9)), (names[2], (0,))):
        data = bytearray((out / name).read_bytes())
        starts = [match.start() for match in re.finditer(b"\x89PNG", data)]
        for place in places:
            data[starts[place] + 1] ^= 0xFF
        (out / name).write_bytes(data)
    data = bytearray((out / names[1]).read_bytes())
    data[148:156] = b"garbage!"  # the checksum of the first header
    (out / names[1]).write_bytes(data)
    contents = {entry.file: (out / entry.file).read_bytes() for entry in index.shards}
    facts = {file: {"bytes": len(data), "sha256": sha256(data).hexdigest()} for file, data in contents.items()}
    entries = [entry.model_copy(update=facts[entry.file]) for entry in index.shards]
    write_index(out, index.model_copy(update={"shards": tuple(entries)}))
    return out


def test_any_number_of_decoding_processes_gives_the_same_images_and_the_same_losses(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SourceConfig(path=str(damaged_copy(shards, tmp_path / "damaged")), on_error="skip")
    seen = []
    for processes in (0, 1, 3):
        monkeypatch.setattr(reference_module, "decoding_processes", lambda images, n=processes: n)
        reference = open_reference(config)
        left_out = reference.new_left_out()
        batches = list(reference.read_all(4, left_out))
        seen.append(
            (
                [
                    (len(b.label_N), b.image_NHWC.tobytes(), b.label_N.tolist(), b.number_N.tolist())
                    for b in batches
                ],
                left_out.count,
                left_out.lines,
            )
        )
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][1] == 3 + 15
    names = [entry.file for entry in reference.index.shards]
    assert [[name in line for name in names].index(True) for line in seen[0][2]] == [0, 0, 1, 2]
    stopping = open_reference(config.model_copy(update={"on_error": "stop"}))
    with pytest.raises(UserError, match=f"{names[0]}, sample"):
        list(stopping.read_all(4))
    assert not multiprocessing.active_children()


def test_statistics_of_decoding_processes_are_those_of_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for processes in (0, 2):
        monkeypatch.setattr(reference_module, "decoding_processes", lambda images, n=processes: n)
        real_statistics(images_of(shards), Pixels(), tmp_path / f"{processes}")
        found.append({path.name: path.read_bytes() for path in (tmp_path / f"{processes}").rglob("*.npz")})
    assert len(found[0]) == 4 and found[0] == found[1]


class Pixels:
    """Pixels as features."""

    name, dimension, spatial_dimension, fingerprint, description = "pixels", 64, None, "pixels", {}

    def features(self, image_NHWC: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": image_NHWC.reshape(len(image_NHWC), -1)[:, :64].astype(np.float32)}


def test_processes_decode_where_there_are_enough_images_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert [decoding_processes(images) for images in (0, 1023, 1024)] == [0, 0, 11]
    for cores, processes in ((1, 0), (2, 0), (3, 0), (4, 3)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert decoding_processes(10**6) == processes
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    assert decoding_processes(10**6) == 16
    monkeypatch.setattr(decoding, "this_process", lambda: ThisProcess(rank=3, ranks=32, processes_here=16))
    assert decoding_processes(10**6) == 7
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert decoding_processes(10**6) == 0
