"""Classes and seeds as people write them in Python: one or many, names, numbers, ranges."""

import operator
from collections.abc import Iterable, Sequence
from typing import Final, SupportsIndex

from ditmoe.model.errors import UserError
from ditmoe.model.outside.nearest import meant
from ditmoe.model.outside.text import normal
from ditmoe.model.settings import LARGEST_SEED

Classes = str | SupportsIndex | Iterable[str | SupportsIndex]
"""A class or several: by name, by number, or mixed."""
Seeds = SupportsIndex | Iterable[SupportsIndex]
"""A seed or several."""

MOST_DEFAULT_CLASSES: Final = 16
MOST_SEEDS: Final = 100_000


def labels_of(classes: Classes | None, names: Sequence[str], told: str = "classes") -> list[int]:
    """The labels that classes stand for, in their order.

    A text that is a class's name is that class, before it is a number; it may be several of either with commas
    between. A name may have commas in it: the longest name that the next parts make is taken. Capitals do not
    matter where only one class has the name.

    Args:
        classes: None: all, or 16 spread over them.
        names: of all classes.
        told: what the user calls them, for messages.

    Raises:
        UserError: one is neither; names all such, and the nearest name.
    """
    if classes is None:
        shown = min(len(names), MOST_DEFAULT_CLASSES)
        return [place * len(names) // shown for place in range(shown)]
    labels: list[int] = []
    wrong: list[str | SupportsIndex] = []
    table = _Table(names)
    for each in _each(classes):
        found, lost = table.of_text(each) if isinstance(each, str) else table.of_number(each)
        labels += found
        wrong += lost
    if wrong:
        texts = [part for part in wrong if isinstance(part, str)]
        listed = ", ".join(names[:MOST_DEFAULT_CLASSES]) + (", …" if len(names) > MOST_DEFAULT_CLASSES else "")
        raise UserError(
            f"{told}: {', '.join(map(repr, wrong))} found; expected numbers from 0 to {len(names) - 1}, or names:"
            f" {listed}{meant(texts, names, 0.6)}"
        )
    if not labels:
        raise UserError(f"{told}: none found; expected one at least, or None for all")
    return labels


def _each(classes: Classes) -> list[str | SupportsIndex]:
    if isinstance(classes, str | SupportsIndex) and not _is_array(classes):
        return [classes]
    if isinstance(classes, Iterable):
        return list(classes)
    raise UserError(f"classes = {classes!r:.60}: expected names, numbers, or a list of them")


def _is_array(value: object) -> bool:
    """Whether it has several numbers: an array has `__index__`, which fails, whatever its shape."""
    return bool(getattr(value, "shape", ()))


class _Table:
    """Looks classes up."""

    def __init__(self, names: Sequence[str]) -> None:
        self._count = len(names)
        self._labels: dict[str, int] = {}
        folded: dict[str, list[int]] = {}
        for label, name in enumerate(names):
            self._labels.setdefault(normal(name), label)
            folded.setdefault(normal(name).casefold(), []).append(label)
        self._folded = {name: labels[0] for name, labels in folded.items() if len(labels) == 1}
        self._longest = max(name.count(",") for name in names) + 1

    def of_number(self, number: SupportsIndex) -> tuple[list[int], list[SupportsIndex]]:
        """The label, or the number where it is none."""
        try:
            label = operator.index(number)
        except TypeError:
            return [], [number]
        fits = not isinstance(number, bool) and 0 <= label < self._count
        return ([label], []) if fits else ([], [number])

    def of_text(self, text: str) -> tuple[list[int], list[str]]:
        """The labels of a text, and its parts that are no class."""
        labels: list[int] = []
        wrong: list[str] = []
        parts = text.split(",")
        while parts:
            for length in range(min(self._longest, len(parts)), 0, -1):
                label = self._of_name(",".join(parts[:length]))
                if label is not None:
                    labels.append(label)
                    break
            else:
                wrong.append(normal(parts[0].strip()))
            del parts[:length]
        return labels, wrong

    def _of_name(self, text: str) -> int | None:
        name = normal(text.strip())
        label = self._labels.get(name, self._folded.get(name.casefold()))
        if label is None and name.isascii() and name.isdigit() and int(name) < self._count:
            label = int(name)
        return label


def seeds_of(seed: Seeds) -> int | list[int]:
    """One seed for all images, or a list of seeds.

    Raises:
        UserError: it is no whole number from 0 on, or there are none or too many of them.
    """
    if isinstance(seed, SupportsIndex) and not _is_array(seed):
        return _seed(seed)
    if not isinstance(seed, Iterable) or isinstance(seed, str):
        raise UserError(f"seed = {seed!r:.60}: expected a whole number, a list of them, or a range")
    seeds = [_seed(each) for each in seed]
    if not 0 < len(seeds) <= MOST_SEEDS:
        raise UserError(f"seed: {len(seeds):,} seeds found; expected 1 to {MOST_SEEDS:,}")
    return seeds


def _seed(value: SupportsIndex) -> int:
    try:
        seed = operator.index(value)
    except TypeError:
        seed = -1
    if isinstance(value, bool) or not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed = {value!r:.60}: expected a whole number from 0 to {LARGEST_SEED}")
    return seed


def image_numbers(count: int, classes: int, images_per_unit: int) -> list[int]:
    """The numbers of images that take the classes in turn: 0, 1, … for independent ones.

    Of chains, row r of class c is sample r mod S of chain (r div S)·classes + c.
    """
    numbers = []
    for place in range(count):
        row, column = divmod(place, classes)
        block, sample = divmod(row, images_per_unit)
        numbers.append((block * classes + column) * images_per_unit + sample)
    return numbers
