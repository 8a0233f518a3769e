"""Images and labels in one .npz file, such as the `samples.npz` that evaluations write and read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.making.class_names import MAX_CLASSES
from ditmoe.data.making.sources.base import SourceImage
from ditmoe.data.shards.images import describe
from ditmoe.data.storage.arrays import UNREADABLE, named_arrays
from ditmoe.data.storage.files import open_regular
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted, is_fit_to_print, normal, printable


class Npz:
    """`images` or `arr_0`: uint8 `[N, H, W, C]` or `[N, H, W]`; `labels` or `arr_1`: integers `[N]`.

    An optional `class_names`, strings `[classes]`; without it the classes are named by their numbers.
    """

    channels: int | None = None

    def __init__(self, path: Path) -> None:
        """Read the arrays into memory. UserError when one is missing, pickled, or of another form."""
        self._path = path
        self.name = path.stem
        try:
            with open_regular(path) as file, named_arrays(file) as arrays:
                image_NHWC = _take(path, arrays, "images", "arr_0")
                label_N = _take(path, arrays, "labels", "arr_1")
                names = arrays.get("class_names")
        except OSError as error:
            raise UserError(f"{path}: could not be read: {error.strerror or error}") from error
        except UNREADABLE as error:
            text = describe(error).splitlines()[0]
            # numpy's words for an array of objects: "Object arrays cannot be loaded when allow_pickle=False"
            pickled = " (pickled objects are never read)" if "pickle" in text else ""
            raise UserError(f"{path}: not a readable .npz file: {text}{pickled}") from error

        if image_NHWC.dtype != np.uint8 or image_NHWC.ndim not in (3, 4):
            raise UserError(
                f"{path}: images are {image_NHWC.dtype} {list(image_NHWC.shape)}, "
                "expected uint8 [N, H, W, C] or [N, H, W]"
            )
        self._image_NHWC = image_NHWC[..., None] if image_NHWC.ndim == 3 else image_NHWC
        if 0 in image_NHWC.shape:
            raise UserError(f"{path}: images are of shape {list(image_NHWC.shape)}: there is nothing in them")
        self._label_N = self._check_labels(label_N)
        self.class_names = self._name_classes(names)

    def _check_labels(self, label_N: NDArray[Any]) -> NDArray[np.int64]:
        count = len(self._image_NHWC)
        if label_N.dtype.kind not in "iu" or label_N.shape != (count,):
            raise UserError(
                f"{self._path}: labels are {label_N.dtype} {list(label_N.shape)}, expected integers [{count}]"
            )
        low, high = int(label_N.min()), int(label_N.max())
        if low < 0 or high >= MAX_CLASSES:
            raise UserError(
                f"{self._path}: labels go from {low} to {high}, expected 0 to at most {MAX_CLASSES - 1}"
            )
        return label_N.astype(np.int64)

    def _name_classes(self, names: NDArray[Any] | None) -> tuple[str, ...]:
        classes = int(self._label_N.max()) + 1
        if names is None:
            return tuple(map(str, range(classes)))
        if names.dtype.kind != "U" or names.ndim != 1 or len(names) < classes:
            raise UserError(
                f"{self._path}: class_names are {names.dtype} {list(names.shape)}, "
                f"expected at least {classes} strings, as the largest label is {classes - 1}"
            )
        unprintable = [name for name in names.tolist() if not is_fit_to_print(name)]
        if unprintable:
            raise UserError(f"{self._path}: the class name {unprintable[0]!a} cannot be printed; rename it")
        return tuple(map(normal, names.tolist()))

    def __len__(self) -> int:
        return len(self._label_N)

    def read(self, number: int) -> SourceImage:
        """Image `number`, uint8 `[H, W, C]`."""
        metadata = {"source": self._path.name, "number": number}
        return SourceImage(self._image_NHWC[number], int(self._label_N[number]), metadata)

    def remarks(self) -> list[str]:
        """Classes without images."""
        absent = np.flatnonzero(np.bincount(self._label_N, minlength=len(self.class_names)) == 0)
        return [f"{counted(len(absent), 'class')} without images, the first is {absent[0]}"] if len(absent) else []


def _take(path: Path, arrays: Mapping[str, NDArray[Any]], *names: str) -> NDArray[Any]:
    for name in names:
        if name in arrays:
            return arrays[name]
    has = ", ".join(map(printable, arrays)) or "nothing"
    raise UserError(f"{path}: has no `{'` or `'.join(names)}`; it has {has}")
