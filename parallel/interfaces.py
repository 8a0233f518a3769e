"""The network interface by which a machine reaches the others of its run.

gloo listens at the address that the machine's own name has. Debian and others give it 127.0.1.1, which no other
machine can reach.
"""

import ipaddress
import socket
from typing import Final

import psutil

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_ANY_PORT: Final = 9
"""Nothing is sent to it: connecting a datagram socket only asks for the route."""


def source_address(host: str) -> Address | None:
    """This machine's address as another one sees it; None where there is no way there.

    Args:
        host: name or address of the other; of this machine itself: what its name stands for.
    """
    try:
        places = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, place in places:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(place)
                return _address(probe.getsockname()[0])
        except OSError:
            continue
    return None


def choose_interface(source: Address | None, peer: str | None) -> str | None:
    """The interface that gloo must be told; None where it finds the right one by itself.

    Args:
        source: this machine's address on the way to rank 0's.
        peer: an address of another machine of the run; None: it has no other.
    """
    if peer is None or not _is_loopback(socket.gethostname()):
        return None
    if source is None or source.is_loopback:  # this is rank 0's machine
        source = source_address(peer)
    return None if source is None else interface_of(source)


def interface_of(source: Address) -> str | None:
    """The name of this machine's interface that has an address."""
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            if entry.family in (socket.AF_INET, socket.AF_INET6) and _address(entry.address) == source:
                return str(name)
    return None


def _is_loopback(name: str) -> bool:
    """Whether a machine's name stands for itself alone, or for nothing."""
    try:
        first = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return True
    return _address(str(first)).is_loopback


def _address(text: str) -> Address:
    """An address without its zone."""
    return ipaddress.ip_address(text.partition("%")[0])
