"""How a process of GPUs joins its group."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ditmoe.parallel import processes
from tests.pretend.gpu import pretended_gpu
from tests.pretend.tensors import WrongDevice


def test_nccl_is_begun_for_the_process_s_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is set before, and the group of one process is of itself alone."""
    with pretended_gpu(index=3, count=4) as gpu:
        order: list[Any] = []
        monkeypatch.setattr(torch.cuda, "set_device", order.append)
        begin = dist.init_process_group
        monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: order.append("begin") or begin(*a, **k))
        processes.meet(gpu.device, timedelta(seconds=77))
        try:
            assert order == [torch.device("cuda", 3), "begin"]
            (begun,) = gpu.groups.beginnings
            assert (begun["backend"], begun["device_id"]) == ("nccl", torch.device("cuda", 3))
            assert (begun["rank"], begun["world_size"]) == (0, 1) and begun["timeout"] == timedelta(seconds=77)
            there = torch.ones(2, device=gpu.device)
            dist.all_reduce(there)
            with pytest.raises(WrongDevice, match="allreduce_ of host memory by NCCL"):
                dist.all_reduce(torch.ones(2))
            assert dist.get_backend() == "nccl" and not gpu.waits
            beside = dist.new_group(backend="gloo")
            dist.all_reduce(torch.ones(2), group=beside)
            with pytest.raises(WrongDevice, match="allreduce_ of device memory by gloo"):
                dist.all_reduce(there, group=beside)
            assert processes.gather_objects({"a": 1}) == [{"a": 1}] and gpu.waits.total() == 1
        finally:
            dist.destroy_process_group()


def test_a_cpu_begins_gloo_without_a_device() -> None:
    with pretended_gpu() as gpu:
        processes.meet(torch.device("cpu"), timedelta(seconds=77))
        try:
            (begun,) = gpu.groups.beginnings
            assert begun["backend"] == "gloo" and begun["device_id"] is None
        finally:
            dist.destroy_process_group()
