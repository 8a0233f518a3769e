"""The samples of a tar and where their members lie, kept small: many shards are open at a time."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple, overload


class Extent(NamedTuple):
    """Where a member's bytes lie in the tar."""

    offset: int
    size: int


class Members(Sequence[dict[str, Extent]]):
    """Extension → extent, of each sample; 70 bytes per sample, and 16 per member, instead of a dict each."""

    def __init__(self) -> None:
        self._extensions: list[tuple[str, ...]] = []
        """Of each sample; samples with the same extensions share one tuple."""
        self._shared: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._first = array("q")
        """Number of each sample's first member."""
        self._offset = array("q")
        self._size = array("q")

    def __len__(self) -> int:
        return len(self._extensions)

    @overload
    def __getitem__(self, sample: int) -> dict[str, Extent]: ...
    @overload
    def __getitem__(self, sample: slice) -> list[dict[str, Extent]]: ...
    def __getitem__(self, sample: int | slice) -> dict[str, Extent] | list[dict[str, Extent]]:
        if isinstance(sample, slice):
            return [self[number] for number in range(*sample.indices(len(self)))]
        extensions, first = self._extensions[sample], self._first[sample]
        return {name: self._extent(first + number) for number, name in enumerate(extensions)}

    def extensions(self, sample: int) -> tuple[str, ...]:
        """Extensions of a sample's members, in the tar's order."""
        return self._extensions[sample]

    def find(self, sample: int, extension: str) -> Extent | None:
        """Where a sample's member lies; null when it has none of this extension."""
        extensions = self._extensions[sample]
        if extension not in extensions:
            return None
        return self._extent(self._first[sample] + extensions.index(extension))

    def begin(self) -> None:
        """Begin the next sample."""
        self._extensions.append(())
        self._first.append(len(self._offset))

    def add(self, extension: str, offset: int, size: int) -> bool:
        """Add a member to the last sample; false when it has one of this extension."""
        extensions = self._extensions[-1]
        if extension in extensions:
            return False
        extensions = (*extensions, extension)
        self._extensions[-1] = self._shared.setdefault(extensions, extensions)
        self._offset.append(offset)
        self._size.append(size)
        return True

    def _extent(self, member: int) -> Extent:
        return Extent(self._offset[member], self._size[member])


class Contents(NamedTuple):
    """What a scan of a tar's headers found."""

    keys: list[str]
    """Key of each sample, in the tar's order."""
    members: Members
    """Extension → extent, of each sample."""
    problem: str | None
    """Why the scan stopped early or what is wrong with the archive; null: whole."""
