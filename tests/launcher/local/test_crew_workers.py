"""At which address a machine of a crew is found."""

import socket

import psutil
import pytest

from ditmoe.launcher.local import crew_workers
from ditmoe.launcher.local.crew_workers import LOOPBACK, check_gpus, own_address
from ditmoe.model.errors import UserError


def test_an_interface_or_an_address_of_this_machine_is_taken() -> None:
    assert own_address("lo") == LOOPBACK and own_address("127.0.0.5") == "127.0.0.5"
    assert own_address("localhost", "192.0.2.9") in (LOOPBACK, "::1")


@pytest.mark.parametrize("listen", ["192.0.2.254", "0.0.0.0", "::", "no-such-thing.invalid", "", "a" * 300])
def test_what_is_none_of_this_machine_is_refused(listen: str) -> None:
    with pytest.raises(UserError, match=r"--listen '.*': nothing of this machine; expected .*lo"):
        own_address(listen)


def test_a_machine_that_has_lost_a_gpu_does_not_begin_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure of a machine, not the user's: the job comes back on another."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    check_gpus(0)
    check_gpus(7)
    with pytest.raises(RuntimeError, match="shows 7 GPUs; expected 8"):
        check_gpus(8)


def test_towards_another_it_is_the_address_of_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_address(None, "127.0.0.9") == LOOPBACK
    mine = {
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    assert own_address() in mine
    # Without a way to the world, and with a name that stands for this machine alone, as Debian has it.
    monkeypatch.setattr(crew_workers, "source_address", lambda other: None)
    others = [address for address in crew_workers._addresses() if not address.startswith("127.")]
    assert own_address() == (others[0] if others else LOOPBACK)
