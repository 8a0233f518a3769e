"""Sources that are opened together: classes, caps, scores, and what cannot be mixed."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditmoe.data.making.foreign import ForeignSettings, index_foreign
from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.shapes import Shapes
from ditmoe.data.shards.index import DatasetIndex, ShardEntry, load_index, write_index
from ditmoe.data.shards.sample_table import SampleColumns, write_table
from ditmoe.data.shards.writer import ShardLimits
from ditmoe.data.stream.config import DataConfig, SourceConfig
from ditmoe.data.stream.dataset import Dataset, changed_facts, open_dataset
from ditmoe.data.stream.selection import LEFT_OUT, Selection, map_classes, select
from ditmoe.data.stream.stream import Batch, dealing_of, open_stream
from ditmoe.model.errors import UserError
from tests.data.making.foreign_tars import picture, write_tar

NAMES = ("cat", "dog", "eel")


def index_of(names: tuple[str, ...], *samples: int) -> DatasetIndex:
    shards = tuple(
        ShardEntry(file=f"{number}.tar", samples=count, bytes=1, sha256="0" * 64)
        for number, count in enumerate(samples)
    )
    return DatasetIndex(
        name="d", image_size=8, channels=3, num_classes=len(names), class_names=names, shards=shards
    )


def source(**values: Any) -> SourceConfig:
    return SourceConfig.model_validate({"path": "there", **values})


def mapped(names: tuple[str, ...], **classes: Any) -> list[int]:
    index = index_of(names, 1)
    return map_classes(index, source(classes=classes), NAMES, "data.sources.1").tolist()


def test_classes_of_the_same_name_are_the_same() -> None:
    assert mapped(("eel", "cat")) == [2, 0]
    assert mapped(NAMES) == [0, 1, 2]


def test_classes_are_mapped_by_name_or_number_and_left_out_by_null() -> None:
    assert mapped(("tabby", "dog", "yak"), tabby="cat", yak=None) == [0, 1, LEFT_OUT]
    assert mapped(("tabby", "dog"), **{"0": 2}) == [2, 1]


def test_equal_classes_are_kept_though_two_have_one_name() -> None:
    index = index_of(("crane", "crane"), 1)
    assert map_classes(index, source(), ("crane", "crane"), "k").tolist() == [0, 1]
    with pytest.raises(UserError, match="crane, and it is the name of several classes of the first source"):
        map_classes(index_of(("crane",), 1), source(), ("crane", "crane"), "k")


def test_all_that_is_wrong_with_a_map_is_said_at_once() -> None:
    with pytest.raises(UserError) as raised:
        mapped(("tabby", "yak"), tabby="cow", ox="cat")
    lines = str(raised.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("data.sources.1.classes.ox: no class of the source; expected one of tabby, yak")
    assert lines[1].startswith(
        "data.sources.1.classes.tabby = cow: no class; expected one of cat, dog, eel, or null"
    )
    assert lines[2] == "data.sources.1.classes: has no entry for yak, and it is no class of the first source"


TABLE = SampleColumns(
    np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], dtype=np.int32),
    np.array([0.9, 0.1, 0.5, np.nan, 0.7, 0.2, 0.3, 0.8, 0.6, 0.4], dtype=np.float32),
)


def chosen(
    samples: SampleColumns | None = TABLE, names: tuple[str, ...] = NAMES, seed: int = 0, **values: Any
) -> list[int]:
    """Numbers of the used samples of three shards of 4, 4 and 2."""
    index, config = index_of(names, 4, 4, 2), source(**values)
    label_of = map_classes(index, config, NAMES, "data.sources.0")
    return used(select(index, samples, config, label_of, seed=seed, number=0))


def used(selection: Selection) -> list[int]:
    starts = (0, 4, 8)
    numbers = []
    for start, members, whole, count in zip(starts, selection.members, (4, 4, 2), selection.counts, strict=True):
        here = range(whole) if members is None else members.tolist()
        assert len(here) == count
        numbers += [start + member for member in here]
    return numbers


def test_everything_is_used_unless_something_says_otherwise() -> None:
    assert chosen() == chosen(None) == list(range(10))


def test_scores_have_a_floor_and_a_sample_without_one_is_below_it() -> None:
    assert chosen(min_score=0.5) == [0, 2, 4, 7, 8]


def test_classes_that_are_left_out_are_not_read() -> None:
    assert chosen(classes={"dog": None}) == [0, 2, 3, 5, 6, 8, 9]
    marked = TABLE._replace(label_N=np.where(np.arange(10) == 4, -1, TABLE.label_N).astype(np.int32))
    assert chosen(marked) == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_caps_are_kept_and_the_seed_chooses() -> None:
    for seed in range(20):
        capped = chosen(max_samples=4, seed=seed)
        assert len(capped) == 4 and capped == chosen(None, max_samples=4, seed=seed)
        by_class = chosen(max_per_class=2, seed=seed)
        assert np.bincount(TABLE.label_N[by_class]).tolist() == [2, 2, 2]
        # The floor comes first: of class 2 only two pass it, of class 0 one.
        both = chosen(min_score=0.5, max_per_class=1, seed=seed)
        assert np.bincount(TABLE.label_N[both]).tolist() == [1, 1, 1] and set(both) <= {0, 2, 4, 7, 8}
    assert len({tuple(chosen(max_samples=4, seed=seed)) for seed in range(20)}) > 5


def test_what_cannot_be_known_or_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"sources.0: min_score, max_per_class needs a table of all samples"):
        chosen(None, min_score=0, max_per_class=3)
    with pytest.raises(UserError, match=r"sources.0: classes with null needs a table"):
        chosen(None, classes={"dog": None})
    with pytest.raises(UserError, match=r"sources.0.min_score = 0.5: the samples of there have no scores"):
        chosen(TABLE._replace(score_N=None), min_score=0.5)
    with pytest.raises(UserError, match=r"sources.0: its settings leave none of the 10 samples of there"):
        chosen(min_score=2)


@pytest.fixture
def two(tmp_path: Path) -> Callable[..., Dataset]:
    """Opens 24 real images of 4 classes and 40 others of 3 of them, with scores, as a mixture."""
    pack(Shapes(24, 4, 8, seed=1), tmp_path / "real", PackSettings(limits=ShardLimits(samples=7)))
    pack(Shapes(40, 3, 8, seed=2), tmp_path / "synthetic", PackSettings(limits=ShardLimits(samples=9)))
    index = load_index(tmp_path / "synthetic")
    labels = np.array(
        [label for label in np.load(tmp_path / "synthetic" / "samples.npz")["label"]], dtype=np.int32
    )
    table = write_table(tmp_path / "synthetic", SampleColumns(labels, np.linspace(0, 1, 40, dtype=np.float32)))
    write_index(tmp_path / "synthetic", index.model_copy(update={"samples": table, "name": "synthetic"}))

    def open_two(
        real: dict[str, Any] | None = None, synthetic: dict[str, Any] | None = None, **data: Any
    ) -> Dataset:
        sources = [
            {"path": str(tmp_path / "real"), **(real or {})},
            {"path": str(tmp_path / "synthetic"), **(synthetic or {})},
        ]
        return open_dataset(DataConfig.model_validate({"sources": sources, "workers": 0, **data}), 5)

    return open_two


def batches(dataset: Dataset, micro_batch: int, count: int) -> list[Batch]:
    stream = open_stream(dataset, dealing_of(dataset.config, start=0, micro_batch=micro_batch, ranks=1))
    return list(islice(stream, count))


def test_a_mixture_has_its_ratio_in_every_batch_and_labels_of_the_run(two: Callable[..., Dataset]) -> None:
    dataset = two(synthetic={"weight": 5, "min_score": 0.5, "classes": {"0": 3}})
    assert [each.total for each in dataset.sources] == [24, 20]
    for batch in batches(dataset, 12, 20):
        real = [key.startswith("shapes/") for key in batch.keys]
        synthetic_labels = {label for label, mine in zip(batch.label_B.tolist(), real, strict=True) if not mine}
        assert sum(real) == 2 and synthetic_labels <= {1, 2, 3}
    progress = dataset.progress(240)
    assert progress == {"shapes": (40, 40 / 24), "synthetic": (200, 10.0)}


def test_what_does_not_fit_together_is_refused(two: Callable[..., Dataset], tmp_path: Path) -> None:
    values = json.loads((tmp_path / "synthetic" / "index.json").read_text())
    values["image_size"] = 16
    (tmp_path / "synthetic" / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"sources.1: image_size is 16, and that of the first source, .*, is 8"):
        two()
    values["image_size"] = 8
    values["latents"] = {"vae": "v", "vae_sha256": "0" * 64, "scale": 0.5, "pixels": 64}
    (tmp_path / "synthetic" / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"sources.1: the kind of its samples is latents, .* is images") as raised:
        two(flip=True)
    assert "data.flip = true with data.sources.1: the latents of" in str(raised.value)


def test_latents_of_another_scale_are_refused(two: Callable[..., Dataset], tmp_path: Path) -> None:
    for name, scale in (("real", 0.18215), ("synthetic", 0.13025)):
        values = json.loads((tmp_path / name / "index.json").read_text())
        values["latents"] = {"vae": "v", "vae_sha256": "0" * 64, "scale": scale, "pixels": 64}
        (tmp_path / name / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"sources.1: latents.scale is 0.13025, .* is 0.18215; expected the same"):
        two()


def test_the_facts_change_with_whatever_changes_the_order(two: Callable[..., Dataset]) -> None:
    facts = two().facts
    assert two().facts == json.loads(json.dumps(facts)) == facts
    for changed in (
        two(lanes=3),
        two(shuffle=3),
        two(synthetic={"weight": 2}),
        two(synthetic={"min_score": 0.2}),
        two(synthetic={"max_samples": 30}),
        two(synthetic={"classes": {"0": 1}}),
    ):
        assert changed.facts != facts
    for same in (two(workers=3), two(synthetic={"on_error": "skip", "timeout": 3}), two(real={"retries": 0})):
        assert same.facts == facts


def test_a_table_that_was_changed_is_refused(two: Callable[..., Dataset], tmp_path: Path) -> None:
    write_table(tmp_path / "synthetic", SampleColumns(np.zeros(40, dtype=np.int32), None))
    with pytest.raises(UserError, match=r"samples.npz: checksum mismatch"):
        two()


def test_an_index_may_lie_elsewhere(two: Callable[..., Dataset], tmp_path: Path) -> None:
    expected = [batch.keys for batch in batches(two(), 6, 4)]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("index.json", "samples.npz"):
        (tmp_path / "synthetic" / name).rename(elsewhere / name)
    with pytest.raises(UserError, match=r"synthetic: has no index\.json"):
        two()
    assert [
        batch.keys for batch in batches(two(synthetic={"index": str(elsewhere / "index.json")}), 6, 4)
    ] == expected


def test_the_same_tars_indexed_otherwise_are_other_data(tmp_path: Path) -> None:
    """A label under another key of the same json, another size, or classes in another order."""
    values = (
        json.dumps({"a": 0, "b": 1, "animal": "dog"}).encode(),
        json.dumps({"a": 1, "b": 0, "animal": "cat"}).encode(),
    )
    write_tar(
        tmp_path / "in/0.tar",
        [(f"{n}", {"png": picture("PNG", (16, 16)), "json": values[n % 2]}) for n in range(8)],
    )

    def facts(**settings: Any) -> dict[str, Any]:
        settings = {"label": "json:a", "image_size": 16, "overwrite": True, **settings}
        index_foreign(tmp_path / "in", ForeignSettings(**settings))
        return open_dataset(DataConfig(sources=(SourceConfig(path=str(tmp_path / "in")),)), 0).facts

    first = facts()
    assert changed_facts(first, facts()) == []
    reading = "reading of them (size, channels, crop or label rule of the index)"
    relabelled = facts(label="json:b")
    assert relabelled["fingerprint"] == first["fingerprint"] and changed_facts(first, relabelled) == [reading]
    assert changed_facts(first, facts(image_size=8)) == ["image size", reading]
    named = facts(label="json:animal", class_names=("dog", "cat"))
    assert changed_facts(named, facts(label="json:animal", class_names=("cat", "dog"))) == [
        "list of classes",
        reading,
    ]
    # What earlier versions did not write down is not held against their checkpoints.
    assert (
        changed_facts({key: value for key, value in first.items() if key not in ("reading", "shards")}, first)
        == []
    )
    assert changed_facts({key: value for key, value in first.items() if key != "lanes"}, first) == ["data.lanes"]


def test_an_index_that_is_a_folder_is_named(digits: Path) -> None:
    config = DataConfig.model_validate({"sources": [{"path": str(digits), "index": str(digits)}]})
    with pytest.raises(UserError, match=r"digits: is a folder, expected a file, such as .*digits/index\.json"):
        open_dataset(config, 0)
