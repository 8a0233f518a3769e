"""What a pretended GPU finds, and what it lets pass."""

from collections.abc import Iterator

import pytest
import torch

from tests.pretend.gpu import Gpu, pretended_gpu
from tests.pretend.tensors import WrongDevice


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with pretended_gpu() as found:
        yield found


def test_tensors_show_the_device_and_compute(gpu: Gpu) -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3).requires_grad_()
    assert x.device == torch.device("cuda", 0) and x.is_cuda and not x.is_cpu
    host = torch.ones(3)
    assert host.device.type == "cpu" and not host.is_cuda
    loss = (x[1] * 2 + torch.tensor(1.0)).sum()  # a number may come from the host
    loss.backward()
    assert x.grad is not None and x.grad.is_cuda and x.grad.new_zeros(2).is_cuda
    assert not gpu.waits
    assert loss.item() == 27 and x.grad.tolist() == [[0, 0, 0], [2, 2, 2]] and gpu.waits.total() == 2
    assert "test_pretend.py:test_tensors_show_the_device_and_compute tolist" in " ".join(gpu.waits)


def test_another_device_than_the_others_is_an_error(gpu: Gpu) -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    for wrong in (
        lambda: there + here,
        lambda: torch.cat((there, here)),
        lambda: here.add_(there.sum()),
        lambda: torch.zeros(()).add_(there.sum()),
        lambda: there.numpy(),
        lambda: torch.ones(1, device="cuda:1"),
        lambda: there.to("cuda:1"),
        lambda: torch.cuda.set_device(1),
        lambda: there.pin_memory(),
    ):
        with pytest.raises(WrongDevice):
            wrong()


def test_copies_that_stop_the_host_are_counted(gpu: Gpu) -> None:
    host = torch.ones(3)
    host.to("cuda")
    host.to("cuda", non_blocking=True)  # not pinned
    torch.tensor([1.0], device="cuda")
    there = torch.empty(3, device="cuda")
    there.copy_(host)
    there.cpu()
    torch.cuda.synchronize()
    torch.cuda.current_stream().synchronize()
    assert gpu.waits.total() == 7
    pinned = host.pin_memory().to("cuda", non_blocking=True)
    assert (pinned + there).is_cuda and gpu.waits.total() == 7


def test_a_mask_and_a_shape_by_values_are_counted(gpu: Gpu) -> None:
    x = torch.ones(4, device="cuda")
    for wait in (lambda: x[x > 0], lambda: x.nonzero(), lambda: bool(x[0] > 0), lambda: x[torch.tensor([1])]):
        before = gpu.waits.total()
        wait()
        assert gpu.waits.total() == before + 1


def test_what_is_read_before_it_is_there_is_an_error(gpu: Gpu) -> None:
    """By the host of a copy, and by a stream of another one's copy."""
    there = torch.ones(3, device="cuda")
    host = torch.empty(3, pin_memory=True)
    host.copy_(there, non_blocking=True)
    event = torch.cuda.Event()
    with pytest.raises(WrongDevice, match="the host reads"):
        host.tolist()
    event.synchronize()  # which was not recorded
    with pytest.raises(WrongDevice, match="the host reads"):
        host + 1
    event.record()
    event.synchronize()
    assert host.tolist() == [1, 1, 1] and not gpu.waits
    copies = torch.cuda.Stream()
    with torch.cuda.stream(copies):
        brought = host.to("cuda", non_blocking=True)
    with pytest.raises(WrongDevice, match="a stream uses"):
        brought + 1
    torch.cuda.current_stream().wait_stream(copies)
    assert (brought + there).tolist() == [2, 2, 2]


def test_cuda_can_be_asked_to_warn_or_to_fail_of_waits(gpu: Gpu) -> None:
    there = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="synchronizing CUDA operation: tolist"):
        there.tolist()
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        there.tolist()


def test_nothing_is_left_of_it() -> None:
    with pretended_gpu():
        there = torch.ones(3, device="cuda")
    assert there.device.type == "cpu" and not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(3, device="cuda")
