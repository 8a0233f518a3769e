"""The ledger of skipped samples: counted by epoch, told by name, limited, and kept over a resume."""

from pathlib import Path

import pytest

from ditmoe.data.stream.config import DataConfig
from ditmoe.data.stream.dataset import Dataset, open_dataset
from ditmoe.data.stream.samples import Skip
from ditmoe.launcher.training.skips import SKIPS_SHOWN, SkipLedger, skips_of_data_ranks
from ditmoe.model.errors import UserError


def dataset_of(folder: Path, skip_budget: int) -> Dataset:
    source = {"path": str(folder), "on_error": "skip", "skip_budget": skip_budget}
    return open_dataset(DataConfig.model_validate({"sources": [source]}), 0)


def skip(position: int, epoch: int = 0) -> Skip:
    return Skip(position, 0, epoch, f"a.tar, sample {position}", "undecodable")


def test_skips_are_counted_told_and_limited_by_epoch(shards: Path) -> None:
    dataset = dataset_of(shards, 30)
    ledger = SkipLedger(dataset, {})
    lines = ledger.add(map(skip, reversed(range(25))))
    assert lines[0] == "skipped a.tar, sample 0: undecodable" and lines[-1] == "… and 5 more"
    assert len(lines) == SKIPS_SHOWN + 1 and ledger.total("tiny") == 25
    again = SkipLedger(dataset, ledger.plain())  # as after a resume
    assert again.add([skip(number, epoch=1) for number in range(100, 130)])
    assert again.total("tiny") == 55
    again.add(map(skip, range(25, 30)))
    with pytest.raises(UserError, match=r"a.tar, sample 30: .* 31 samples .* epoch 0, and its skip_budget is 30"):
        again.add([skip(30)])


def test_ranks_that_read_the_same_samples_skip_the_same() -> None:
    first, second = [skip(1), skip(2)], [skip(7)]
    both = [(0, first), (1, second), None, None, (0, list(first)), (1, list(second))]
    assert sorted(skips_of_data_ranks(both)) == [*first, *second]
    assert skips_of_data_ranks([(0, []), None, (0, [])]) == []
    for other in ([], [skip(1)], [*first, skip(3)]):
        with pytest.raises(UserError, match=r"a.tar, sample [123]: undecodable; not all ranks"):
            skips_of_data_ranks([(0, first), (0, other)])


def test_a_ledger_remembers_two_epochs(shards: Path) -> None:
    ledger = SkipLedger(dataset_of(shards, 1000), {})
    ledger.add([skip(number, epoch) for number, epoch in enumerate([0, 1, 1, 2, 5])])
    assert ledger.plain() == {"tiny": {"total": 5, "by_epoch": {"5": 1}}}
    ledger.add([skip(9, epoch=4)])
    assert ledger.plain() == {"tiny": {"total": 6, "by_epoch": {"4": 1, "5": 1}}}
