"""What the saver copies from a GPU: whole when training goes on, through memory that is pinned once."""

import pytest
import torch

from ditmoe.parallel.boxes import Box
from ditmoe.parallel.checkpoint.box_storage import Piece
from ditmoe.parallel.checkpoint.saver import _HostMemory
from tests.pretend.gpu import pretended_gpu
from tests.pretend.tensors import WrongDevice


def pieces_on(device: torch.device, offload: bool, shift: float = 0.0) -> dict[str, list[Piece]]:
    """Of two parts, one of them with a part of a larger tensor."""
    flat = torch.arange(20.0, device="cpu" if offload else device) + shift
    return {
        "weights": [Piece("a", (5, 4), Box(1, 0, 2, 4), flat[4:12].view(2, 4))],
        "ema": [
            Piece("a", (5, 4), Box(0, 0, 5, 4), flat.view(5, 4)),
            Piece("b", (1, 1), Box(0, 0, 1, 1), flat[:1].view(1, 1)),
        ],
    }


def values(pieces: dict[str, list[Piece]]) -> list[float]:
    return [value for part in pieces.values() for piece in part for value in piece.tensor.flatten().tolist()]


@pytest.mark.parametrize("offload", [False, True])
def test_copies_are_on_the_host_and_whole(offload: bool) -> None:
    memory = _HostMemory()
    with pretended_gpu(index=1, count=2) as gpu:
        for shift in (0.0, 100.0):
            source = pieces_on(gpu.device, offload, shift)
            found = memory.copy(source, gpu.device)
            tensors = [piece.tensor for part in found.values() for piece in part]
            assert not any(tensor.is_cuda for tensor in tensors) and all(map(gpu.memory.is_pinned, tensors))
            # One stop for all of them; nothing else of a copy waits.
            assert gpu.waits.total() == 1 and "Stream.synchronize" in next(iter(gpu.waits))
            gpu.waits.clear()
            assert values(found) == values(source)
            gpu.waits.clear()
        assert len(gpu.memory.registered) == 1, "the memory is used again"
        memory.close()
        assert not gpu.memory.registered


def test_a_copy_that_is_not_waited_for_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu() as gpu:
        monkeypatch.setattr("tests.pretend.streams.Stream.synchronize", lambda self: None)
        memory = _HostMemory()
        found = memory.copy(pieces_on(gpu.device, False), gpu.device)
        with pytest.raises(WrongDevice, match="the host reads a copy"):
            values(found)
        memory.close()


def test_what_a_rank_owns_does_not_change() -> None:
    with pretended_gpu() as gpu:
        memory = _HostMemory()
        source = pieces_on(gpu.device, False)
        memory.copy(source, gpu.device)
        with pytest.raises(AssertionError, match="does not change"):
            memory.copy({"weights": source["weights"]}, gpu.device)
        memory.close()
