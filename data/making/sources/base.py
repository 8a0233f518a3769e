"""The face that all sources of images to pack have."""

from dataclasses import dataclass
from typing import Any, Protocol

from ditmoe.data.shards.images import ImageArray


@dataclass(frozen=True)
class SourceImage:
    """One image of a source, as it is there."""

    image_HWC: ImageArray
    """uint8 `[H, W, C]`, of any size."""
    label: int
    metadata: dict[str, Any]
    """Plain data that says where the image comes from; becomes the sample's json."""


class Source(Protocol):
    """Images with labels, read by number."""

    name: str
    """Default name of the dataset."""
    class_names: tuple[str, ...]
    channels: int | None
    """Channels to convert to unless the user says otherwise; null: as they are."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> SourceImage:
        """Image `number`. UserError naming the file when it cannot be read."""
        ...

    def remarks(self) -> list[str]:
        """What the user should know of the source, one line each."""
        ...
