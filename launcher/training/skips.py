"""Samples that could not be used: counted by source, told by name, and a run's end beyond the budget."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from ditmoe.data.stream.dataset import Dataset
from ditmoe.data.stream.samples import Skip
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted

SKIPS_SHOWN: Final = 20
"""Skips of one record that the log names; the others are counted."""


def skips_of_data_ranks(by_rank: Iterable[tuple[int, list[Skip]] | None]) -> list[Skip]:
    """The skips of all data ranks, each once.

    Args:
        by_rank: of every rank its data rank and its skips; None of a rank that reads no samples.

    UserError when ranks that read the same samples skipped different ones, so that they trained on different ones.
    """
    by_data_rank: dict[int, list[Skip]] = {}
    for data_rank, skips in (each for each in by_rank if each is not None):
        known = by_data_rank.setdefault(data_rank, skips)
        if known != skips:
            differing = min(set(known) ^ set(skips))
            raise UserError(
                f"{differing.where}: {differing.reason}; not all ranks that read this sample met with that, so"
                " they trained on different ones. Nothing of the steps since the last checkpoint was saved; repeat"
                " the command once all of them can read the shard, or none can"
            )
    return [skip for skips in by_data_rank.values() for skip in skips]


class SkipLedger:
    """The skips of a run; part of a checkpoint, so that a resume forgets none.

    Args:
        plain: what `plain` gave when the checkpoint was written; empty for a new run.
    """

    def __init__(self, dataset: Dataset, plain: Mapping[str, Mapping[str, Any]]) -> None:
        self._dataset = dataset
        self._totals = Counter({name: int(facts["total"]) for name, facts in plain.items()})
        self._by_epoch = Counter(
            {
                (name, int(epoch)): int(count)
                for name, facts in plain.items()
                for epoch, count in facts["by_epoch"].items()
            }
        )

    def add(self, skips: Iterable[Skip]) -> list[str]:
        """Count the skips of some steps on all ranks; what the log says of them.

        UserError when a source has more of them in one epoch than its budget.
        """
        ordered = sorted(skips)
        for skip in ordered:
            name = self._dataset.sources[skip.source].name
            self._totals[name] += 1
            self._by_epoch[name, skip.epoch] += 1
        for skip in ordered:
            source = self._dataset.sources[skip.source]
            count = self._by_epoch[source.name, skip.epoch]
            if count > source.config.skip_budget:
                raise UserError(
                    f"{skip.where}: {skip.reason}; it is one of {counted(count, 'sample')} of "
                    f"data.sources.{skip.source}"
                    f" ({source.name}) skipped in its epoch {skip.epoch}, and its skip_budget is"
                    f" {source.config.skip_budget:,}"
                )
        lines = [f"skipped {skip.where}: {skip.reason}" for skip in ordered[:SKIPS_SHOWN]]
        return lines + ([f"… and {len(ordered) - SKIPS_SHOWN:,} more"] if len(ordered) > SKIPS_SHOWN else [])

    def total(self, name: str) -> int:
        """Skips of a source since the run began."""
        return self._totals[name]

    def plain(self) -> dict[str, dict[str, Any]]:
        """As plain data: of each source that has any, all of them, and those of its latest two epochs."""
        kept: dict[str, dict[str, Any]] = {
            name: {"total": total, "by_epoch": {}} for name, total in self._totals.items()
        }
        latest = {name: max(epoch for of, epoch in self._by_epoch if of == name) for name in kept}
        for (name, epoch), count in self._by_epoch.items():
            if epoch >= latest[name] - 1:
                kept[name]["by_epoch"][str(epoch)] = count
        return kept
