"""What of a source is used: its classes in those of the run, a quality floor, and caps."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.shards.decode import BadSample
from ditmoe.data.shards.index import DatasetIndex
from ditmoe.data.shards.sample_table import SampleColumns
from ditmoe.data.stream.config import SourceConfig
from ditmoe.model.errors import UserError
from ditmoe.model.outside.nearest import meant
from ditmoe.model.outside.text import normal
from ditmoe.model.randomness import permutation

LEFT_OUT = -1
"""Stands for the label of what is not used."""


class Selection(NamedTuple):
    """The samples of a source that a run uses."""

    label_of: NDArray[np.int64]
    """Label in the source → label in the run, or LEFT_OUT."""
    members: tuple[NDArray[np.int64] | None, ...]
    """Of each shard of the index the numbers of its used samples, rising; null: all of them."""
    counts: tuple[int, ...]
    """Of each shard how many these are."""

    def run_label(self, label: int) -> int:
        """The label in the run of a sample that is used. BadSample when its class is left out."""
        found = int(self.label_of[label])
        if found == LEFT_OUT:
            raise BadSample("its label is another than the table of samples says")
        return found


def map_classes(
    index: DatasetIndex, config: SourceConfig, run_names: Sequence[str], key: str
) -> NDArray[np.int64]:
    """Label in the source → label in the run, or LEFT_OUT. `key` is the source's, for messages.

    UserError listing every class that has no place in the run, and every name that is no class.
    """
    problems: list[str] = []
    named: dict[int, str | int | None] = {}
    for name, target in config.classes.items():
        label = _label(name, index.class_names)
        if isinstance(label, str):
            problems.append(
                f"{key}.classes.{name}: {label} of the source; expected one of {_list(index.class_names)}"
                f"{meant(str(name), index.class_names)}"
            )
        else:
            named[label] = target
    same = list(map(normal, index.class_names)) == list(map(normal, run_names))
    label_of = np.full(index.num_classes, LEFT_OUT, dtype=np.int64)
    for label, name in enumerate(index.class_names):
        target = named.get(label, label if same else name)
        if target is None:
            continue
        found = _label(target, run_names)
        if not isinstance(found, str):
            label_of[label] = found
        elif label in named:
            problems.append(
                f"{key}.classes.{name} = {target}: {found}; expected one of {_list(run_names)}, or null"
                f"{meant(str(target), run_names)}"
            )
        else:
            problems.append(f"{key}.classes: has no entry for {name}, and it is {found} of the first source")
    if problems:
        shown = problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise UserError("\n".join(shown))
    return label_of


def select(
    index: DatasetIndex,
    samples: SampleColumns | None,
    config: SourceConfig,
    label_of: NDArray[np.int64],
    *,
    seed: int,
    number: int,
) -> Selection:
    """Choose a source's samples. `number` is the source's among `data.sources`.

    UserError when what decides is not known, or nothing is left.
    """
    key = f"data.sources.{number}"
    used = np.ones(index.total, dtype=bool)
    if samples is None:
        needs = [
            name
            for name, needed in (
                ("min_score", config.min_score is not None),
                ("max_per_class", config.max_per_class is not None),
                ("classes with null", bool((label_of == LEFT_OUT).any())),
            )
            if needed
        ]
        if needs:
            raise UserError(
                f"{key}: {', '.join(needs)} needs a table of all samples, and the index of {config.shown} names"
                " none; `ditmoe data index` writes one"
            )
    else:
        label_N = np.where(samples.label_N < 0, LEFT_OUT, label_of[samples.label_N])
        used &= label_N != LEFT_OUT
        if config.min_score is not None:
            if samples.score_N is None:
                raise UserError(
                    f"{key}.min_score = {config.min_score:g}: the samples of {config.shown} have no scores"
                )
            used &= np.nan_to_num(samples.score_N, nan=-np.inf) >= config.min_score
        if config.max_per_class is not None:
            used = _cap(used, label_N, config.max_per_class, seed, number)
    if config.max_samples is not None:
        used = _cap(used, np.zeros(index.total, dtype=np.int64), config.max_samples, seed, number)
    if not used.any():
        raise UserError(f"{key}: its settings leave none of the {index.total:,} samples of {config.shown}")
    return _by_shard(used, index.samples_per_shard, label_of)


def _cap(
    used: NDArray[np.bool_], group_N: NDArray[np.int64], most: int, seed: int, number: int
) -> NDArray[np.bool_]:
    """At most so many of each group, the first in an order that the seed draws."""
    shuffled = permutation(seed, f"data/cap/source {number}", 0, len(used))
    shuffled = shuffled[used[shuffled]]
    by_group = shuffled[np.argsort(group_N[shuffled], kind="stable")]
    sizes = np.bincount(group_N[by_group])
    rank = np.arange(len(by_group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    kept = np.zeros_like(used)
    kept[by_group[rank < most]] = True
    return kept


def _by_shard(used: NDArray[np.bool_], per_shard: Sequence[int], label_of: NDArray[np.int64]) -> Selection:
    parts = np.split(used, np.cumsum(per_shard)[:-1])
    members = tuple(None if part.all() else np.flatnonzero(part) for part in parts)
    return Selection(label_of, members, tuple(int(part.sum()) for part in parts))


def _label(value: str | int, names: Sequence[str]) -> int | str:
    """The label that a name or number stands for, or why it stands for none."""
    text = str(value)
    if text not in names:
        text, names = normal(text), [normal(name) for name in names]
    if text in names:
        return names.index(text) if list(names).count(text) == 1 else "the name of several classes"
    if text.isascii() and text.isdigit() and int(text) < len(names):
        return int(text)
    return "no class"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f", … or 0 to {len(names) - 1}" if len(names) > 10 else "")
