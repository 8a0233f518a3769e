"""An image folder: one sub-folder per class, whose sorted names are the classes (the ImageFolder layout)."""

import os
from pathlib import Path
from typing import Final

from ditmoe.data.making.sources.base import SourceImage
from ditmoe.data.shards.images import BadImage, load_pixels, open_image, photograph_to_rgb, to_array
from ditmoe.model.errors import UserError

FORMATS: Final = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
"""File suffix → Pillow format. A file's true format may be any of them: photographs are often misnamed."""
REMARKS_SHOWN: Final = 5


class ImageFolder:
    """Every image below `folder/CLASS/`, in sorted order, converted to RGB."""

    channels: int | None = 3

    def __init__(self, folder: Path) -> None:
        """List the files. UserError when there is no class, or a class without images."""
        self._folder = folder
        self.name = folder.resolve().name
        self._ignored: list[str] = []
        self.class_names = tuple(self._class_folders())
        if not self.class_names:
            raise UserError(f"{folder}: has no sub-folders; expected one per class, with the images inside")
        self._files: list[tuple[str, int]] = []
        empty = []
        for label, name in enumerate(self.class_names):
            before = len(self._files)
            self._files += [(file, label) for file in self._images_below(name)]
            if len(self._files) == before:
                empty.append(name)
        if empty:
            raise UserError(
                f"{folder}: no images ({', '.join(FORMATS)}) in the class folders {', '.join(empty)}; "
                "remove them or fill them"
            )

    def _class_folders(self) -> list[str]:
        names = []
        for entry in sorted(os.scandir(self._folder), key=lambda entry: entry.name):
            if entry.is_dir() and not entry.name.startswith("."):
                if not entry.name.isprintable():  # a name in no known encoding among them
                    raise UserError(
                        f"{self._folder}: the class folder {entry.name!a} cannot be printed; rename it"
                    )
                names.append(entry.name)
            else:
                self._ignored.append(entry.name)
        return names

    def _images_below(self, class_name: str) -> list[str]:
        found: list[str] = []
        seen: set[str] = set()
        for root, folders, files in os.walk(self._folder / class_name, followlinks=True):
            folders.sort()
            real = os.path.realpath(root)
            if real in seen:  # a link that leads back, whose images would come again and again
                folders.clear()
                self._ignored.append(os.path.relpath(root, self._folder))
                continue
            seen.add(real)
            for file in sorted(files):
                relative = os.path.relpath(os.path.join(root, file), self._folder)
                is_image = Path(file).suffix.lower() in FORMATS and not file.startswith(".")
                (found if is_image else self._ignored).append(relative)
        return found

    def __len__(self) -> int:
        return len(self._files)

    def read(self, number: int) -> SourceImage:
        """Image `number`, uint8 `[H, W, 3]`."""
        file, label = self._files[number]
        path = self._folder / file
        try:
            with open(path, "rb") as stream:
                image = load_pixels(open_image(stream, tuple(sorted(set(FORMATS.values())))))
                return SourceImage(to_array(photograph_to_rgb(image)), label, {"source": file})
        except BadImage as error:
            raise UserError(f"{path}: {error}") from error
        except OSError as error:
            raise UserError(f"{path}: could not be read: {error.strerror or error}") from error

    def remarks(self) -> list[str]:
        """The files that are no images."""
        if not self._ignored:
            return []
        shown = ", ".join(ascii(name)[1:-1] for name in self._ignored[:REMARKS_SHOWN])
        more = f" and {len(self._ignored) - REMARKS_SHOWN:,} more" if len(self._ignored) > REMARKS_SHOWN else ""
        return [f"left out, not {', '.join(FORMATS)} in a class folder, or there twice: {shown}{more}"]
