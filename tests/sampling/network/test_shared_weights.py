"""Weights that the processes of a machine hold once."""

import ctypes
import fcntl
import gc
import json
import multiprocessing
import os
import re
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.initialise import initialise
from ditmoe.parallel.checkpoint.folder import checkpoint_path, write_weights_checkpoint
from ditmoe.sampling.drawing.generate import generate
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, ModelOfJob, prepare_job
from ditmoe.sampling.network.load import LoadedModel, load_model, shared_folder
from ditmoe.sampling.network.shared_weights import WeightsFile
from ditmoe.sampling.settings.config import SamplerConfig
from tests.sampling.small_run import write_digits, write_run
from tests.small_disk import small_file_system

CONFIG = ModelConfig(
    depth=3, hidden=256, heads=2, patch=4, experts=4, experts_per_token=1, image_size=8, channels=1, num_classes=3
)
CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 38 MB of weights, mostly experts."""
    network = DiT(CONFIG)
    initialise(network, 0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    state = canonical_state(network)
    path = tmp_path_factory.mktemp("large") / "step-00000001"
    write_weights_checkpoint(path, CONFIG, ObjectiveConfig(), state, state)
    return path


def draw(model: LoadedModel, precision: Any) -> bytes:
    images = generate(model, None, range(6), SamplerConfig(steps=2, precision=precision), 4)
    return images.image_NHWC.numpy().tobytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_they_are_the_bits_that_a_process_alone_reads(large: Path, tmp_path: Path, precision: Any) -> None:
    own = load_model(large, precision=precision)
    for _ in range(2):  # made, and found
        shared = load_model(large, precision=precision, shared=tmp_path)
        expected, found = own.network.state_dict(), shared.network.state_dict()
        assert list(found) == list(expected)
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
            assert tensor.data_ptr() % 64 == 0, name
        assert not any(parameter.requires_grad for parameter in shared.network.parameters())
        assert draw(shared, precision) == draw(own, precision)
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, framework="pt") as stored:  # by the library of the format
        assert torch.equal(
            stored.get_tensor("blocks.2.moe.experts.up_proj"), found["blocks.2.moe.experts.up_proj"]
        )
    assert file.stat().st_size < 1.01 * sum(tensor.nbytes for tensor in found.values())


def test_what_is_written_to_them_stays_with_a_process(large: Path, tmp_path: Path) -> None:
    first, second = (load_model(large, shared=tmp_path).network.state_dict() for _ in range(2))
    kept = second["final_layer.linear.weight"].clone()
    first["final_layer.linear.weight"].zero_()
    assert torch.equal(second["final_layer.linear.weight"], kept)


def pss() -> int:
    """Bytes of this process's memory, of which it has its share where others hold the same."""
    found = re.search(r"\nPss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return int(found[1]) * 1024


def memory(key: str) -> int:
    """Bytes, by a key of /proc/self/status."""
    found = re.search(rf"\n{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def free_what_is_free() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def hold(large: Path, shared: Path | None, barrier: Any, sender: Any) -> None:
    """Sends by how much this process's memory grew while it and the others loaded, read every weight and drew; how
    far it had grown at most; and the images."""
    torch.set_num_threads(1)
    wrote = []
    write = WeightsFile.write
    WeightsFile.write = lambda *arguments: wrote.append(write(*arguments))  # type: ignore[method-assign,assignment,return-value]
    draw(
        load_model(large), "fp32"
    )  # what loading and drawing take once, and pages that are no longer the parent's
    free_what_is_free()
    barrier.wait(120)
    before = pss()
    Path("/proc/self/clear_refs").write_text("5")  # the most that it has held is what it holds
    most = memory("VmHWM")
    barrier.wait(120)
    model = load_model(large, shared=shared)
    for weights in model.network.parameters():
        assert weights.sum().isfinite()
    most = memory("VmHWM") - most
    images = draw(model, "fp32")
    free_what_is_free()
    barrier.wait(120)
    grown = pss() - before
    barrier.wait(120)
    sender.send((grown, most, images, len(wrote)))


def held_by(processes: int, large: Path, shared: Path | None) -> tuple[int, int, set[bytes], int]:
    """Bytes by which the memory of all of them grew, of one at most; their images; how many wrote a file."""
    barrier = CONTEXT.Barrier(processes)
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(processes)]
    started = [CONTEXT.Process(target=hold, args=(large, shared, barrier, sender)) for _, sender in pipes]
    for process in started:
        process.start()
    found = []
    for receiver, _ in pipes:
        assert receiver.poll(120)
        found.append(receiver.recv())
    for process in started:
        process.join(60)
    grown, most, images, wrote = zip(*found, strict=True)
    return sum(grown), max(most), set(images), sum(wrote)


def test_processes_hold_them_once_together(large: Path, tmp_path: Path) -> None:
    size = sum(parameter.nbytes for parameter in load_model(large).network.parameters())
    assert size > 30e6
    one, most, expected, wrote = held_by(1, large, tmp_path)
    assert wrote == 1 and one > 0.9 * size, "the measure sees the weights"
    assert most < 1.15 * size, "of who writes the file: its pages, and what is on its way to them"
    own, _, images, _ = held_by(2, large, None)
    assert images == expected and own > 1.8 * size, "the measure sees them twice"
    for processes in (2, 4):
        together, most, images, wrote = held_by(processes, large, tmp_path)
        assert images == expected
        assert wrote == 1, "one of those that came at once"
        assert together < one + 0.25 * size, (processes, together / size, one / size)
        assert most < 1.15 * size
        assert not list(tmp_path.glob("*.safetensors")), "they have ended"


def test_the_last_to_let_go_removes_the_file(large: Path, tmp_path: Path) -> None:
    first, second = (load_model(large, shared=tmp_path) for _ in range(2))
    (file,) = tmp_path.iterdir()
    let_go = weakref.ref(first.network)
    del first
    assert let_go() is None and file.exists()
    expected = draw(second, "fp32")
    del second
    assert list(tmp_path.iterdir()) == []
    assert draw(load_model(large, shared=tmp_path), "fp32") == expected


def hang(large: Path, shared: Path, sender: Any) -> None:
    model = load_model(large, shared=shared)
    sender.send(model.fingerprint)
    threading.Event().wait()


def test_what_killed_processes_leave_is_used_or_removed(large: Path, tmp_path: Path) -> None:
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=hang, args=(large, tmp_path, sender))
    process.start()
    assert receiver.poll(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    (left,) = tmp_path.iterdir()
    made = left.stat().st_ino
    again = load_model(large, shared=tmp_path)
    assert left.stat().st_ino == made
    other = load_model(large, "weights", shared=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2, "one that is used stays"
    with left.open() as locked:
        fcntl.flock(locked, fcntl.LOCK_SH)  # as a process that is killed, once this is closed
        del again
        assert left.exists()
    bf16 = load_model(large, precision="bf16", shared=tmp_path)
    assert not left.exists() and len(list(tmp_path.glob("*.safetensors"))) == 2
    del other, bf16


def test_a_file_of_something_else_is_not_used(large: Path, tmp_path: Path) -> None:
    model = load_model(large, shared=tmp_path)
    expected = draw(model, "fp32")
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    del model
    for wrong in (content[:-1], content + b"x", content[:20] + b"x" + content[21:], b""):
        file.write_bytes(wrong)
        model = load_model(large, shared=tmp_path)
        assert file.read_bytes() == content
        assert draw(model, "fp32") == expected
        del model


def test_a_damaged_checkpoint_is_told_and_no_file_is_made(large: Path, tmp_path: Path) -> None:
    marker = large / "checkpoint.json"
    (name,) = [name for name in json.loads(marker.read_text())["files"] if name.startswith("ema/")]
    content = (large / name).read_bytes()
    try:
        (large / name).write_bytes(content[:-4] + b"????")
        with pytest.raises(UserError, match="its contents have changed"):
            load_model(large, shared=tmp_path)
    finally:
        (large / name).write_bytes(content)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_the_process_holds_its_own(large: Path, tmp_path: Path) -> None:
    said: list[str] = []
    expected = draw(load_model(large), "fp32")
    with small_file_system(tmp_path / "small", 64) as folder:  # less than twice the file
        assert draw(load_model(large, shared=folder / "shared", log=said.append), "fp32") == expected
        assert list((folder / "shared").iterdir()) == []
        (folder / "filled").write_bytes(bytes(64 * 2**20 - 2**16))
        (folder / "more").touch()
        load_model(large, shared=folder / "shared", log=said.append)
    assert len(said) == 2
    for line in said:
        assert re.search(r"shared/.*could not be written: .*; this process holds weights of its own", line), line
    assert "bytes are free, expected twice the" in said[0]


def test_a_folder_that_cannot_be_written_is_told(large: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "file").touch()
    model = load_model(large, shared=tmp_path / "file" / "shared", log=said.append)
    assert draw(model, "fp32") == draw(load_model(large), "fp32")
    (line,) = said
    assert "could not be written: Not a directory; this process holds weights of its own" in line


def test_several_processes_of_an_evaluation_share_those_of_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    options = EvaluationOptions(
        source=run,
        sampler=SamplerConfig(steps=1),
        data=write_digits(tmp_path / "digits"),
        cache=tmp_path / "cache",
    )
    job, cpu = prepare_job(options), torch.device("cpu")
    alone, several = ModelOfJob(cpu), ModelOfJob(cpu, several=True)
    alone.network(job)
    assert not (run / "shared-weights").exists()
    several.network(job)
    (file,) = (run / "shared-weights").iterdir()
    assert shared_folder(checkpoint_path(run, 0)).resolve() == file.parent
    del several
    assert not file.exists()
    named = ModelOfJob(cpu)
    named.network(prepare_job(EvaluationOptions(**{**vars(options), "shared_weights": tmp_path / "named"})))
    assert list((tmp_path / "named").iterdir())
