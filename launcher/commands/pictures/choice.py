"""What `ditmoe sample` draws: classes, seeds, and the numbers of images."""

from typing import Final

from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import normal
from ditmoe.model.settings import LARGEST_SEED

MOST_DEFAULT_CLASSES: Final = 16
MOST_SEEDS: Final = 100_000


def choose_classes(text: str | None, names: tuple[str, ...]) -> list[int]:
    """The labels that `--classes` stands for.

    A part that is a class's name is that class before it is a number. A name may have commas in it: the longest
    name that the next parts make is taken.

    Raises:
        UserError: a part is neither; names all such parts, and the nearest name.
    """
    import difflib

    if text is None:
        total = len(names)
        shown = min(total, MOST_DEFAULT_CLASSES)
        return [place * total // shown for place in range(shown)]
    chosen, wrong = [], []
    label_of = {normal(name): label for label, name in reversed(list(enumerate(names)))}
    longest = max(name.count(",") for name in names) + 1
    parts = text.split(",")
    while parts:
        for length in range(min(longest, len(parts)), 0, -1):
            part = normal(",".join(parts[:length]).strip())
            if part in label_of:
                break
        del parts[:length]
        if part in label_of:
            chosen.append(label_of[part])
        elif part.isascii() and part.isdigit() and int(part) < len(names):
            chosen.append(int(part))
        else:
            wrong.append(part)
    if wrong:
        nearest = [near for part in wrong for near in difflib.get_close_matches(part, label_of, n=1)]
        meant = f" Did you mean {', '.join(dict.fromkeys(nearest))}?" if nearest else ""
        listed = ", ".join(names[:MOST_DEFAULT_CLASSES]) + (", …" if len(names) > MOST_DEFAULT_CLASSES else "")
        raise UserError(
            f"--classes: {', '.join(map(repr, wrong))} found; expected numbers from 0 to {len(names) - 1}, "
            f"or names: {listed}.{meant}"
        )
    return chosen


def choose_seeds(text: str) -> list[int]:
    """The seeds that `--seeds` stands for, in their order, each once: `0-63`, or `1,5,9-12`.

    Raises:
        UserError: a part is neither a seed nor a range of them, or there are too many.
    """
    chosen: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = (each.strip() for each in part.partition("-"))
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and int(end) <= LARGEST_SEED for end in ends):
            raise UserError(
                f"--seeds {text}: {part.strip()!r} found; expected seeds and ranges, such as 0-63 or 1,5,9-12"
            )
        low, high = map(int, ends)
        if high < low:
            raise UserError(f"--seeds {text}: {part.strip()!r} ends before it begins; expected {high}-{low}")
        if high - low >= MOST_SEEDS or len(chosen) + high - low >= MOST_SEEDS:
            raise UserError(f"--seeds {text}: expected {MOST_SEEDS:,} seeds at most")
        chosen |= dict.fromkeys(range(low, high + 1))
    return list(chosen)


def image_numbers(count: int, classes: int, images_per_unit: int) -> list[int]:
    """The numbers of images that take the classes in turn: 0, 1, … for independent ones.

    Of chains, the samples of one stand below each other in the column of its class: row r of column c is sample
    r mod S of chain (r div S)·classes + c.
    """
    numbers = []
    for place in range(count):
        row, column = divmod(place, classes)
        block, sample = divmod(row, images_per_unit)
        numbers.append((block * classes + column) * images_per_unit + sample)
    return numbers


def ranges(seeds: list[int]) -> str:
    """Seeds as `--seeds` takes them, those that follow each other as a range."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1][1:] = [seed]
        elif not parts or seed != parts[-1][-1]:
            parts.append([seed])
    return ",".join("-".join(map(str, part)) for part in parts)
