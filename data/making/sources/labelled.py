"""An image folder whose labels, and perhaps scores, stand in a CSV or JSON file: synthetic images of others."""

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

from ditmoe.data.making.class_names import MAX_CLASSES, as_name, as_number
from ditmoe.data.making.sources.base import SourceImage
from ditmoe.data.making.sources.folder import FORMATS, refuse_unreadable
from ditmoe.data.shards.images import BadImage, load_pixels, open_image, photograph_to_rgb, to_array
from ditmoe.data.storage.files import open_regular
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted, is_fit_to_print

_PROBLEMS_SHOWN: Final = 20


class _Row(NamedTuple):
    """One image of the list."""

    where: str
    """File and line, for messages."""
    file: str
    """Path of the image in the folder."""
    label: str | int
    score: float | None
    others: dict[str, Any]
    """All other columns."""


class LabelledFolder:
    """The images that the list names, in its order, converted to RGB.

    The list is a CSV with a header, a JSON list of objects, or JSON lines. Columns or keys: `file`, the path in
    the folder; `label`, a number or a name; `score`, optional; all others become the sample's provenance.
    """

    channels: int | None = 3

    def __init__(self, folder: Path, labels: Path, class_names: tuple[str, ...] | None = None) -> None:
        """Read the list. UserError naming every row that is wrong, up to 20 of them."""
        self._folder = folder
        self._labels = labels
        self.name = folder.resolve().name
        rows: list[_Row] = []
        problems: list[str] = []
        first: dict[str, str] = {}
        for where, values in _read(labels):
            try:
                row = _row(where, values)
                if row.file in first:
                    raise ValueError(f"{row.file} comes twice, first in {first[row.file]}")
                first[row.file] = where.rpartition(", ")[2]
                rows.append(row)
            except ValueError as error:
                problems.append(f"{where}: {error}")
        _raise(problems)
        if not rows:
            raise UserError(f"{labels}: lists no images")
        self._rows = rows
        self.class_names, self._label_of = _classes(rows, class_names)
        _raise(
            f"{row.where}: label is {str(row.label)[:40]!a}, {_expected(rows, self.class_names, class_names)}"
            for row in rows
            if row.label not in self._label_of
        )

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, number: int) -> SourceImage:
        """Image `number`, uint8 `[H, W, 3]`."""
        row = self._rows[number]
        path = self._folder / row.file
        try:
            with open_regular(path) as stream:
                image = load_pixels(open_image(stream, tuple(sorted(set(FORMATS.values())))))
                image_HWC = to_array(photograph_to_rgb(image))
        except BadImage as error:
            raise UserError(f"{row.where}: {path}: {error}") from error
        except OSError as error:
            raise UserError(f"{row.where}: {path}: could not be read: {error.strerror or error}") from error
        metadata: dict[str, Any] = {"source": row.file}
        if row.score is not None:
            metadata["score"] = row.score
        if row.others:
            metadata["provenance"] = row.others
        return SourceImage(image_HWC, self._label_of[row.label], metadata)

    def remarks(self) -> list[str]:
        """How many images the list does not name."""
        named = {row.file for row in self._rows}
        unnamed = 0
        for root, _, files in os.walk(self._folder, onerror=refuse_unreadable):
            below = os.path.relpath(root, self._folder)
            for file in files:
                path = file if below == "." else f"{below}/{file}"
                unnamed += Path(file).suffix.lower() in FORMATS and path not in named
        return [f"left out: {counted(unnamed, 'image')} that {self._labels} does not list"] if unnamed else []


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with where it stands. UserError when the file cannot be read, or is none of the three kinds."""
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text: {error}") from error
    if path.suffix == ".csv":
        yield from _read_csv(path, text)
    elif path.suffix == ".json":
        values = _parse_json(str(path), text)
        if not isinstance(values, list):
            raise UserError(f"{path}: is a {type(values).__name__}, expected a list of objects")
        for number, value in enumerate(values, start=1):
            yield _object(f"{path}, entry {number}", value)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(io.StringIO(text), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _object(where, _parse_json(where, line))
    else:
        raise UserError(f"--labels is {path}, expected a file .csv, .json or .jsonl")


def _read_csv(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        for column in ("file", "label"):
            if header.count(column) != 1:
                raise UserError(
                    f"{path}: its first line is {','.join(header)!a}, expected one column named {column}"
                )
        if len(set(header)) != len(header):
            raise UserError(f"{path}: its first line names a column twice: {','.join(header)!a}")
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(f"{where}: {len(cells)} columns, and the first line has {len(header)}")
            yield where, {name: cell for name, cell in zip(header, cells, strict=True) if cell != ""}
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error


def _parse_json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: could not be read: {error}") from error


def _object(where: str, value: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: is a {type(value).__name__}, expected an object with file and label")
    return where, value


def _row(where: str, values: dict[str, Any]) -> _Row:
    """One row. ValueError saying what is wrong with it."""
    others = dict(values)
    file, label, score = others.pop("file", None), others.pop("label", None), others.pop("score", None)
    if not isinstance(file, str) or not file or not is_fit_to_print(file):
        raise ValueError(f"file is {file!a}, expected the path of an image in the folder")
    parts = PurePosixPath(file)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"file is {file!a}, which leads out of the folder")
    if as_number(label) is None and as_name(label) is None:
        raise ValueError(f"label is {str(label)[:40]!a}, expected a number from 0 on, or a name")
    return _Row(where, str(parts), as_name(label) or label, _score(score), others)


def _score(value: Any) -> float | None:
    if value is None:
        return None
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"score is {str(value)[:40]!a}, expected a finite number")
    return score


def _classes(rows: list[_Row], given: tuple[str, ...] | None) -> tuple[tuple[str, ...], dict[str | int, int]]:
    """The names of the classes, and the label of each value that is one; the first row says what labels are."""
    values = {row.label for row in rows}
    if _by_name(rows, given):
        names = given or tuple(sorted({str(value) for value in values if as_number(value) is None}))
        return names, {name: label for label, name in enumerate(names)}
    limit = MAX_CLASSES if given is None else len(given)
    label_of = {value: number for value in values if (number := as_number(value)) is not None and number < limit}
    return given or tuple(map(str, range(max(label_of.values(), default=0) + 1))), label_of


def _by_name(rows: list[_Row], given: tuple[str, ...] | None) -> bool:
    return as_number(rows[0].label) is None or (given is not None and rows[0].label in given)


def _expected(rows: list[_Row], names: tuple[str, ...], given: tuple[str, ...] | None) -> str:
    if given is not None:
        return f"expected one of the {len(names)} class names, or a number below that"
    if _by_name(rows, given):
        return "a number, where the first row has a name; expected names, or numbers, throughout"
    return f"expected a number from 0 to {MAX_CLASSES - 1:,}, as in the first row"


def _raise(problems: Any) -> None:
    """UserError with the first problems, where there are any."""
    listed = list(problems)
    if listed:
        more = [f"and {len(listed) - _PROBLEMS_SHOWN:,} more rows"] if len(listed) > _PROBLEMS_SHOWN else []
        raise UserError("\n".join([*listed[:_PROBLEMS_SHOWN], *more]))
