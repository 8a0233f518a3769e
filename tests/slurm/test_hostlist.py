"""Lists of nodes: what Slurm writes, what `scontrol show hostnames` makes of it, and what is no list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe.model.errors import UserError
from ditmoe.slurm.hostlist import MOST_HOSTS, hosts_of


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("n1", "n1"),
        ("n[1-3]", "n1 n2 n3"),
        ("gpu[01-03,7],login", "gpu01 gpu02 gpu03 gpu7 login"),
        ("a[08-11]", "a08 a09 a10 a11"),
        ("r[1-2]c[0-1]", "r1c0 r1c1 r2c0 r2c1"),
        ("gpu-[7]-x.site.edu,b", "gpu-7-x.site.edu b"),
        ("n2,n1,n2", "n2 n1 n2"),
        ("[1-2]", "1 2"),
    ],
)
def test_lists_as_slurm_writes_them(short: str, long: str) -> None:
    assert hosts_of(short) == long.split()


@pytest.mark.parametrize(
    "wrong",
    ["", ",", "a,,b", "a,", "n[1", "n1]", "n[]", "n[a-b]", "n[3-1]", "n[1-]", "n[[1]]", "n[٣]", "n[0-99999999]"],
)
def test_what_is_no_list(wrong: str) -> None:
    with pytest.raises(UserError, match="nodes "):
        hosts_of(wrong)


def test_a_list_of_everything_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=f"more than {MOST_HOSTS} nodes"):
        hosts_of("n[1-60000][1-60000][1-60000]")


@given(st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 40), st.integers(1, 5)), min_size=1, max_size=5))
def test_ranges_are_counted_through(ranges: list[tuple[int, int, int]]) -> None:
    short = ",".join(f"{first:0{width}d}-{first + more:0{width}d}" for first, more, width in ranges)
    long = [f"n{k:0{width}d}" for first, more, width in ranges for k in range(first, first + more + 1)]
    assert hosts_of(f"n[{short}]") == long
