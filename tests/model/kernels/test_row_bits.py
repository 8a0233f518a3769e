"""Products of pieces of rows: the same bits among any number of rows."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditmoe.model.experts.moe import Experts
from ditmoe.model.kernels.row_bits import SIZES, agreeing_sizes, linear_by_pieces, pieces_of

HIDDEN, WIDTH = 48, 96


@pytest.fixture
def tried_anew() -> Iterator[None]:
    agreeing_sizes.cache_clear()
    yield
    agreeing_sizes.cache_clear()


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("inner", "outer"), [(HIDDEN, WIDTH), (1536, 64), (384, 1536), (7, 5)])
def test_a_rows_bits_do_not_depend_on_how_many_there_are(threads: int, inner: int, outer: int) -> None:
    """1,536 numbers and two threads are where MKL's own products differ on some processors."""
    torch.manual_seed(0)
    x_RI, weight_OI = torch.randn(1100, inner), torch.randn(outer, inner)
    whole = linear_by_pieces(x_RI, weight_OI)
    torch.testing.assert_close(whole, F.linear(x_RI, weight_OI), rtol=1e-4, atol=1e-4)
    for rows in (1, 2, 15, 16, 17, 64, 100, 191, 300, 1025):
        for first in (0, 1100 - rows):
            some = slice(first, first + rows)
            assert torch.equal(linear_by_pieces(x_RI[some], weight_OI), whole[some]), rows


def test_sizes_that_add_up_in_another_order_are_not_used(
    monkeypatch: pytest.MonkeyPatch, tried_anew: None
) -> None:
    """A library that begins at the other end between 64 and 192 rows."""
    asked: list[int] = []
    plain = torch.mm

    def turns_round(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        asked.append(len(x))
        if 64 <= len(x) <= 192:
            x, weight = x.flip(1), weight.flip(0)
        return plain(x, weight) if out is None else plain(x, weight, out=out)

    monkeypatch.setattr(torch, "mm", turns_round)
    sizes = agreeing_sizes(HIDDEN, WIDTH, torch.get_num_threads())
    assert sizes == tuple(size for size in SIZES if not 64 <= size <= 192)
    asked.clear()
    x_RI, weight_OI = torch.randn(100, HIDDEN), torch.randn(WIDTH, HIDDEN)
    found = linear_by_pieces(x_RI, weight_OI)
    assert asked == [48, 48, 16]
    torch.testing.assert_close(found, F.linear(x_RI, weight_OI), rtol=1e-4, atol=1e-4)


def test_pieces_cover_the_rows_and_little_more() -> None:
    for sizes in (SIZES, (16,), (48, 208, 1024)):
        for rows in range(3000):
            pieces = list(pieces_of(rows, sizes))
            assert set(pieces) <= set(sizes)
            assert rows <= sum(pieces) <= max(1.25 * rows, rows + sizes[0] - 1)
            assert sum(pieces[:-1]) < rows or not pieces
    assert list(pieces_of(600, SIZES)) == [608]


@pytest.mark.parametrize("counts", [[60, 2, 130], [0, 192, 0], [100, 0, 92]])
def test_experts_are_the_plain_ones(counts: list[int]) -> None:
    torch.manual_seed(0)
    experts = Experts(3, HIDDEN, WIDTH)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x_AD, counts_N = torch.randn(192, HIDDEN), torch.tensor(counts)
    with torch.inference_mode():
        plain, found = experts.one_by_one(x_AD, counts_N), experts(x_AD, counts_N)
        assert torch.equal(found, experts.by_pieces(x_AD, counts_N))
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
