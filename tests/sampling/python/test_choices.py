"""Classes and seeds as people write them."""

from typing import Any

import numpy as np
import pytest
import torch

from ditmoe.model.errors import UserError
from ditmoe.sampling.python.choices import labels_of, seeds_of

NAMES = ("cat", "dog", "tench, Tinca tinca", "7", "Polish", "polish", "Zoë", "eight")


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        ("cat", [0]),
        ("Cat", [0]),
        (1, [1]),
        ("1", [1]),
        ("7", [3]),  # a name before a number
        (7, [7]),
        (["cat", 1, "tench, Tinca tinca"], [0, 1, 2]),
        ("cat,dog", [0, 1]),
        ("tench, Tinca tinca,1", [2, 1]),
        (("polish", "Polish"), [5, 4]),
        ("Zoe\u0308", [6]),
        (["cat", "cat"], [0, 0]),
        (range(3), [0, 1, 2]),
        (np.array([3, 1]), [3, 1]),
        (np.int64(2), [2]),
        (torch.tensor([0, 4]), [0, 4]),
        (torch.tensor(4), [4]),
        (None, list(range(8))),
    ],
)
def test_classes(classes: Any, labels: list[int]) -> None:
    assert labels_of(classes, NAMES) == labels


def test_classes_left_out_are_sixteen_spread_over_all() -> None:
    assert labels_of(None, [str(number) for number in range(32)]) == list(range(0, 32, 2))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("kat", r"^classes: 'kat' found; expected numbers from 0 to 7, or names: cat, .*; did you mean cat\?$"),
        (["cat", 8, -1, "9"], r"^classes: 8, -1, '9' found"),
        ("POLISH", "'POLISH' found"),
        (True, "True found"),
        (1.5, r"classes = 1\.5"),
        ([1.5], r"1\.5 found"),
        ([], "none found"),
    ],
)
def test_what_is_no_class(classes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        labels_of(classes, NAMES)


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [(0, 0), (np.int64(5), 5), (range(2, 5), [2, 3, 4]), ([7, 7], [7, 7]), (torch.arange(2), [0, 1])],
)
def test_seeds(seed: Any, seeds: int | list[int]) -> None:
    assert seeds_of(seed) == seeds


@pytest.mark.parametrize("seed", [-1, 1.0, "3", True, [], [0, -1], 2**63, range(10**6), None])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(UserError, match=r"^seed"):
        seeds_of(seed)
