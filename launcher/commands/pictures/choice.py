"""What `ditmoe sample` draws: classes and seeds."""

from ditmoe.model.errors import UserError
from ditmoe.model.settings import LARGEST_SEED
from ditmoe.sampling.python.choices import MOST_SEEDS, labels_of


def choose_classes(text: str | None, names: tuple[str, ...]) -> list[int]:
    """The labels that `--classes` stands for.

    Raises:
        UserError: a part is none; names all such parts, and the nearest name.
    """
    return labels_of(text, names, "--classes")


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


def ranges(seeds: list[int]) -> str:
    """Seeds as `--seeds` takes them, those that follow each other as a range."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1][1:] = [seed]
        elif not parts or seed != parts[-1][-1]:
            parts.append([seed])
    return ",".join("-".join(map(str, part)) for part in parts)
