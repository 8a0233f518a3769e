"""The real handwritten digits that ship with scikit-learn: 1,797 scans of 8×8 cells, 10 classes.

Alpaydin & Kaynak, "Optical recognition of handwritten digits", UCI machine learning repository, 1998 (its test
set). Each cell counts the inked pixels, 0 … 16, of a 4×4 block of the scan.
"""

import numpy as np
from sklearn.datasets import load_digits

from ditmoe.data.making.sources.base import SourceImage


class Digits:
    """The scans in their published order, ink white on black, grey."""

    name = "digits"
    class_names = tuple("0123456789")
    channels: int | None = None

    def __init__(self) -> None:
        bunch = load_digits()
        ink_NHW = np.rint(bunch.images).astype(np.int64)
        # round(ink · 255 / 16) in integers, halves upwards: exact on every machine
        self._image_NHW = ((ink_NHW * 255 + 8) // 16).astype(np.uint8)
        self._label_N = bunch.target.astype(np.int64)

    def __len__(self) -> int:
        return len(self._label_N)

    def read(self, number: int) -> SourceImage:
        """Scan `number`, uint8 `[8, 8, 1]`."""
        metadata = {"source": "sklearn.datasets.load_digits", "number": number}
        return SourceImage(self._image_NHW[number, :, :, None], int(self._label_N[number]), metadata)

    def remarks(self) -> list[str]:
        """None."""
        return []
