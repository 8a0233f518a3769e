"""Indexing tars that others made, so that they can be read where they lie and as they are.

ImageNet-style webdatasets (`jpg` + `cls`) and img2dataset's output (`jpg` + `json` + `txt`) among them. Every tar
is looked through once (`foreign_shards.py`); then it is decided whether labels are numbers or names, and an index
and a table of samples are written. The table has −1 for samples that cannot be used.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from ditmoe.data.making.class_names import MAX_CLASSES, as_number
from ditmoe.data.making.foreign_shards import ShardFacts, SurveyRules, find_label_rule, parse_key, survey_shard
from ditmoe.data.making.ownership import OLD_LOCK_FILE, look_through, read_record
from ditmoe.data.making.reshuffle import class_mix
from ditmoe.data.shards.index import INDEX_FILE, DatasetIndex, load_index
from ditmoe.data.shards.names import OTHERS_ALLOWED, is_plain_file_name
from ditmoe.data.shards.sample_table import TABLE_FILE, SampleColumns, write_table_and_index
from ditmoe.data.shards.tar_scan import scan
from ditmoe.data.storage.files import make_folder
from ditmoe.data.storage.progress import track
from ditmoe.data.storage.workers import in_order
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import is_fit_to_print, printable

REMARKS_SHOWN: Final = 5


@dataclass(frozen=True)
class ForeignSettings:
    """How a folder of tars is indexed."""

    image_size: int | None = None
    """Side in pixels that images are brought to when they are read; null: all are squares of one size."""
    channels: int | None = None
    """1 (grey) or 3 (RGB); null: as the first image has them, with an `image_size` 3."""
    label: str | None = None
    """`cls`, `txt` or `json:KEY`; null: cls."""
    class_names: tuple[str, ...] | None = None
    """Name of each class; null: the distinct labels in order, or their numbers."""
    num_classes: int | None = None
    """Classes; null: as many as there are names, or the largest number and one."""
    score: str | None = None
    """`json:KEY` of the quality score; null: there is none."""
    out: Path | None = None
    """Folder for the index and the table; null: the folder of the tars."""
    workers: int = 0
    """Processes that look through tars; 0: this one."""
    name: str | None = None
    """The dataset's name; null: the folder's."""
    overwrite: bool = False
    """Replace an index that is there."""
    check_images: bool = False
    """Decode every image, not the first of each tar alone."""
    skip_unreadable: bool = False
    """Leave out damaged tars, and samples that cannot be used, instead of writing nothing."""


@dataclass(frozen=True)
class ForeignResult:
    """What was found, and written."""

    index: DatasetIndex | None
    """Null: there were problems, and nothing was written."""
    problems: list[str]
    """One line each, with shard and key."""
    samples_left_out: int
    others: list[str]
    """Keys of entries of the tars that are no samples."""
    warnings: list[str] = field(default_factory=list)
    """What may not be as the user thinks, one line each."""


def index_foreign(folder: Path, settings: ForeignSettings) -> ForeignResult:
    """Look through the tars of a folder and write index.json and samples.npz.

    With problems, and without `skip_unreadable`, nothing is written. UserError when there is nothing to index, the
    labels are not where they should be, or an index is there.
    """
    out = settings.out or folder
    _check_places(folder, out, settings.overwrite)
    files, _ = list_tars(folder)
    if not files:
        raise UserError(f"{folder}: holds no *.tar; expected tars right in it, not in folders below")
    rules = SurveyRules(
        label=find_label_rule(_first_good(folder, files), settings.label),
        score_key=None if settings.score is None else parse_key("--score", settings.score),
        image_size=settings.image_size,
        channels=settings.channels,
        check_images=settings.check_images,
    )
    surveyed = in_order(partial(survey_shard, folder, rules), files, settings.workers)
    facts = list(track(surveyed, len(files), "indexing", "shards"))
    survey = _Survey(folder, files, facts, settings)
    survey.settle_form(rules)
    survey.settle_classes()
    survey.settle_scores(rules)
    if survey.problems and not settings.skip_unreadable:
        return ForeignResult(None, survey.problems, 0, survey.others)
    used = int((survey.label_N >= 0).sum())
    if not used:
        first = f"; {survey.problems[0]}" if survey.problems else ""
        raise UserError(f"{folder}: none of the {len(survey.label_N):,} samples can be used{first}")
    make_folder(out)
    size, channels = survey.form
    name = settings.name or folder.resolve().name
    index = DatasetIndex(
        name=name if is_fit_to_print(name) and name else "dataset",
        image_size=size,
        channels=channels,
        num_classes=len(survey.class_names),
        class_names=survey.class_names,
        label=rules.label.model_copy(update={"by_name": survey.by_name}),
        crop=rules.crop,
        shards=tuple(each.entry for each in facts if each.entry is not None),
        left_out=tuple(file for file, each in zip(files, facts, strict=True) if each.entry is None),
    )
    index = write_table_and_index(out, survey.table(), index)
    left_out = len(survey.label_N) - used - len(survey.others)
    mix = class_mix(index, survey.table())
    warnings = [f"{mix}; `ditmoe data reshuffle {folder} OUT` deals them out anew"] if mix.poor else []
    return ForeignResult(index, survey.problems, left_out, survey.others, warnings)


def list_tars(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the tars right in a folder, in order, and of what else lies there.

    UserError when it is no folder, or cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with tars in it")
    tars, others = [], []
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: could not be read: {error.strerror or error}") from error
    for path in entries:
        if is_plain_file_name(path.name, ".tar") and path.is_file():
            tars.append(path.name)
        elif path.name not in (INDEX_FILE, TABLE_FILE):
            others.append(path.name + ("/" if path.is_dir() else ""))
    return tars, others


def remarks(folder: Path) -> list[str]:
    """What lies in the folder and is not indexed, as a line."""
    _, others = list_tars(folder)
    if not others:
        return []
    shown = ", ".join(ascii(name)[1:-1] for name in others[:REMARKS_SHOWN])
    more = f" and {len(others) - REMARKS_SHOWN:,} more" if len(others) > REMARKS_SHOWN else ""
    return [
        f"ignored, no tar with a plain name (letters, digits and {OTHERS_ALLOWED}, a letter or digit first): "
        f"{shown}{more}"
    ]


def _check_places(folder: Path, out: Path, overwrite: bool) -> None:
    """UserError when a pack is under way in the folder, or the index would take another's place."""
    if read_record(folder) is not None or (folder / OLD_LOCK_FILE).exists():
        raise UserError(f"{folder}: is being packed, or the packing did not finish; repeat the pack")
    if out.suffix == ".json" or (out.exists() and not out.is_dir()):
        raise UserError(f"--out is {out}, expected a folder for {INDEX_FILE} and {TABLE_FILE}")
    if out.is_dir() and out.resolve() != folder.resolve() and list_tars(out)[0]:
        raise UserError(f"--out is {out}: holds tars of its own; choose another folder")
    if (out / INDEX_FILE).exists():
        if not overwrite:
            raise UserError(f"{out}: already holds an {INDEX_FILE}; --overwrite replaces it")
        try:
            load_index(out)
        except UserError as error:
            raise UserError(f"{error}; --overwrite replaces an index of ours only") from error
    # Before an index is there, or with one that does not know it, the table is somebody else's.
    if os.path.lexists(out / TABLE_FILE) and TABLE_FILE not in look_through(out).ours:
        raise UserError(
            f"{out / TABLE_FILE}: is in the way, and no index.json names it with its checksum: move it elsewhere, "
            "or choose another folder for the index with --out"
        )


def _first_good(folder: Path, files: Sequence[str]) -> Path:
    """The first tar without fault, for a look at its samples. UserError when there is none."""
    first_problem = None
    for file in files:
        try:
            problem = scan(folder / file).problem
        except OSError as error:
            problem = f"could not be read: {error.strerror or error}"
        if problem is None:
            return folder / file
        first_problem = first_problem or f"{folder / file}: {problem}"
    raise UserError(f"{folder}: none of the {len(files):,} tars can be read; {first_problem}")


@dataclass
class _Survey:
    """All that was found, while it is decided what it means."""

    folder: Path
    files: list[str]
    facts: list[ShardFacts]
    settings: ForeignSettings
    form: tuple[int, int] = (0, 0)
    """Side and channels of the images."""
    by_name: bool = False
    class_names: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.problems = [problem for each in self.facts for problem in each.problems]
        self.others = [key for each in self.facts for key in each.others]
        self.label_N = np.empty(0, np.int32)
        """Label of each sample, in the index's order; −1: it cannot be used. Empty until classes are settled."""

    def table(self) -> SampleColumns:
        """Labels and scores in the index's order."""
        score_N = np.concatenate([each.score_N for each in self.facts])
        return SampleColumns(self.label_N, None if np.isnan(score_N).all() else score_N)

    def settle_form(self, rules: SurveyRules) -> None:
        """The images' side and channels, as most have them; those of another form are problems."""
        counts: Counter[tuple[int, int]] = Counter()
        for each in self.facts:
            codes, found = np.unique(each.form_N[each.form_N >= 0], return_counts=True)
            counts.update({each.forms[code]: int(n) for code, n in zip(codes, found.tolist(), strict=True)})
        if not counts:
            known = self.problems or [f"there is none among {', '.join(map(printable, self.others[:5]))}"]
            raise UserError(f"{self.folder}: no image that was decoded can be used; {known[0]}")
        ((self.form, _),) = counts.most_common(1)
        size, channels = self.form
        if rules.channels not in (None, channels):
            raise UserError(
                f"--channels is {rules.channels}, and the images have {channels}: "
                f"give --image-size too (such as {size}), and they are converted when they are read"
            )
        for number, each in enumerate(self.facts):
            reasons = {}
            for place in np.flatnonzero((each.form_N >= 0) & (each.code_N >= 0)).tolist():
                form = each.forms[each.form_N[place]]
                if form != self.form:
                    has, expected = (f"{side}×{side}×{depth}" for side, depth in (form, self.form))
                    reasons[place] = f"is {has} where most are {expected}; give --image-size to bring all to one"
            self._reject(number, reasons)

    def settle_classes(self) -> None:
        """Whether labels are numbers or names, the classes, and each sample's label."""
        counts: Counter[str | int] = Counter()
        for each in self.facts:
            codes, found = np.unique(each.code_N[each.code_N >= 0], return_counts=True)
            counts.update({each.values[code]: int(n) for code, n in zip(codes, found.tolist(), strict=True)})
        given, limit = self.settings.class_names, self.settings.num_classes
        if given is not None:
            if limit not in (None, len(given)):
                raise UserError(f"--num-classes is {limit}, and --class-names has {len(given)} names")
            limit = len(given)
            names = sum(n for value, n in counts.items() if isinstance(value, str) and value in set(given))
            numbers = sum(n for value, n in counts.items() if as_number(value) in range(limit))
        else:
            names = sum(n for value, n in counts.items() if not _is_number(value))
            numbers = sum(counts.values()) - names
        self.by_name = names > numbers
        if self.by_name:
            self._settle_names(counts, given)
        else:
            self._settle_numbers(counts, given, limit)

    def _settle_names(self, counts: Counter[str | int], given: tuple[str, ...] | None) -> None:
        found = sorted(value for value in counts if isinstance(value, str) and not _is_number(value))
        self.class_names = given or tuple(found)
        if len(self.class_names) > MAX_CLASSES:
            raise UserError(
                f"{self.folder}: {len(found):,} different labels, such as {found[0][:40]!a}: "
                f"more than {MAX_CLASSES:,} classes, so these seem to be no labels; choose others with --label"
            )
        if self.settings.num_classes not in (None, len(self.class_names)):
            raise UserError(
                f"--num-classes is {self.settings.num_classes}, and the labels are {len(self.class_names)} names"
            )
        expected = (
            f"expected one of the {len(self.class_names)} class names" if given else "expected a name, as most are"
        )
        label_of: dict[str | int, int] = {name: label for label, name in enumerate(self.class_names)}
        self._assign(label_of, expected)

    def _settle_numbers(
        self, counts: Counter[str | int], given: tuple[str, ...] | None, limit: int | None
    ) -> None:
        most = limit or MAX_CLASSES
        label_of = {
            value: number for value in counts if (number := as_number(value)) is not None and number < most
        }
        classes = limit or max(label_of.values(), default=0) + 1
        self.class_names = given or tuple(map(str, range(classes)))
        advice = "" if limit else f"; more than {MAX_CLASSES:,} classes need --num-classes"
        self._assign(label_of, f"expected an integer from 0 to {most - 1:,}{advice}")

    def _assign(self, label_of: dict[str | int, int], expected: str) -> None:
        """Give every sample its label; those with none in `label_of` are problems."""
        parts = []
        for number, each in enumerate(self.facts):
            label_V = np.array([*(label_of.get(value, -1) for value in each.values), -1], dtype=np.int32)
            parts.append(label_V[each.code_N])  # a code of −1 takes the last one
            wrong = np.flatnonzero((each.code_N >= 0) & (parts[-1] < 0)).tolist()
            shown = [str(each.values[each.code_N[place]])[:40] for place in wrong]
            self._reject(
                number, {place: f"label is {text!a}, {expected}" for place, text in zip(wrong, shown, strict=True)}
            )
        self.label_N = np.concatenate(parts)

    def settle_scores(self, rules: SurveyRules) -> None:
        """UserError when scores were asked for, and there are none."""
        if rules.score_key is not None and all(np.isnan(each.score_N).all() for each in self.facts):
            raise UserError(
                f"--score json:{rules.score_key}: no sample of {self.folder} has such a number in its json"
            )

    def _reject(self, number: int, reasons: dict[int, str]) -> None:
        """Leave samples of a tar out, by their places in it, and say why."""
        if reasons:
            path = self.folder / self.files[number]
            keys = scan(path).keys  # read again: the keys of all samples might fill the memory
            self.problems += [f"{path}, sample {keys[place]}: {reason}" for place, reason in reasons.items()]
            self.facts[number].code_N[list(reasons)] = -1


def _is_number(value: str | int) -> bool:
    return as_number(value) is not None
