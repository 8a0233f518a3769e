"""Reading one sample: its image or latent, its label and its metadata, as the index describes them."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ditmoe.data.shards.decode import (
    METADATA_EXTENSION,
    BadSample,
    decode_image,
    decode_label,
    decode_metadata,
    image_extension,
)
from ditmoe.data.shards.images import ImageArray
from ditmoe.data.shards.index import DatasetIndex
from ditmoe.data.shards.latents import Moments, decode_latent, latent_extension


class RawSample(NamedTuple):
    """The members of a sample, not decoded."""

    extensions: Iterable[str]
    """Of all of them."""
    read: Callable[[str], bytes | None]
    """Extension → bytes; null: it has no such member. BadSample when they cannot be read."""

    @classmethod
    def of(cls, members: Mapping[str, bytes]) -> "RawSample":
        """Of members in memory."""
        return cls(list(members), members.get)

    def image(self, index: DatasetIndex) -> ImageArray:
        """The pixels, uint8 `[H, W, C]`, as the index says. BadSample when there is no such image."""
        extension = image_extension(self.extensions)
        return decode_image(extension, self._member(extension), index)

    def latent(self, index: DatasetIndex, mirrored: bool = False) -> tuple[Moments, Moments]:
        """Mean and standard deviation of a view, each float32 `[C, H, W]`. BadSample when there is none."""
        extension = latent_extension(self.extensions, index, mirrored)
        return decode_latent(extension, self._member(extension), index)

    def label(self, index: DatasetIndex) -> int:
        """The label, 0 … num_classes − 1. BadSample when there is none."""
        return decode_label(self.read(index.label.extension), index)

    def metadata(self) -> bytes | None:
        """The `json` member as it is stored; null: it has none. BadSample when it is no JSON object."""
        data = self.read(METADATA_EXTENSION)
        if data is not None:
            decode_metadata(data)
        return data

    def _member(self, extension: str) -> bytes:
        data = self.read(extension)
        if data is None:
            raise BadSample(f"has no .{extension}")
        return data
