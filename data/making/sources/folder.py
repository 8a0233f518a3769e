"""An image folder: one sub-folder per class, whose sorted names are the classes (the ImageFolder layout)."""

import os
import stat
from pathlib import Path
from typing import Final

from ditmoe.data.making.sources.base import SourceImage
from ditmoe.data.shards.images import BadImage, load_pixels, open_image, photograph_to_rgb, to_array
from ditmoe.data.storage.files import open_regular
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import is_fit_to_print, normal, printable

FORMATS: Final = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
"""File suffix → Pillow format. A file's true format may be any of them: photographs are often misnamed."""
REMARKS_SHOWN: Final = 5
NOT_OURS: Final = ("@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""Folders that systems put among others, some with small copies of the images. So do hidden ones."""


class ImageFolder:
    """Every image below `folder/CLASS/`, in sorted order, converted to RGB."""

    channels: int | None = 3

    def __init__(self, folder: Path) -> None:
        """List the files. UserError when there is no class, or a class without images."""
        self._folder = folder
        self.name = folder.resolve().name
        self._real = os.path.realpath(folder)
        self._ignored: list[str] = []
        self._seen: set[str] = set()
        self._class_of: dict[str, str] = {}
        """Folder, without links → class."""
        folders = self._class_folders()
        self.class_names = tuple(map(normal, folders))
        if not folders:
            raise UserError(f"{folder}: has no sub-folders; expected one per class, with the images inside")
        self._files: list[tuple[str, int]] = []
        empty = []
        first: dict[str, str] = {}
        for name in folders:
            if first.setdefault(normal(name), name) != name:
                raise UserError(
                    f"{folder}: two class folders are called {normal(name)}, once with letters composed of others "
                    f"({first[normal(name)]!a} and {name!a}); rename one, or move its images to the other"
                )
        for label, name in enumerate(folders):
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
        try:
            entries = sorted(os.scandir(self._folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{self._folder}: could not be read: {error.strerror or error}") from error
        for entry in entries:
            if is_directory(entry.path) and self._is_of_the_source(str(self._folder), entry.name):
                if not is_fit_to_print(entry.name):  # a name in no known encoding among them
                    raise UserError(
                        f"{self._folder}: the class folder {entry.name!a} cannot be printed; rename it"
                    )
                names.append(entry.name)
            else:
                self._ignored.append(entry.name)
        return names

    def _images_below(self, class_name: str) -> list[str]:
        found: list[str] = []
        for root, folders, files in os.walk(
            self._folder / class_name, followlinks=True, onerror=refuse_unreadable
        ):
            below = os.path.relpath(root, self._folder)
            real = os.path.realpath(root)
            label = self._class_of.setdefault(real, class_name)
            if label != class_name:
                raise UserError(
                    f"{self._folder}: {below} and a folder of the class {label} are one folder, {real}: "
                    "its images would have two labels"
                )
            if real in self._seen:  # over another link
                folders.clear()
                self._ignored.append(below)
                continue
            self._seen.add(real)
            for name in sorted(folders):
                if not self._is_of_the_source(root, name):
                    folders.remove(name)
                    self._ignored.append(os.path.join(below, name))
            folders.sort()
            for file in sorted(files):
                # What is named like an image is one to be read, whatever it is: then it is missed by name.
                is_image = Path(file).suffix.lower() in FORMATS and not file.startswith(".")
                if not is_image:
                    is_directory(os.path.join(root, file))
                (found if is_image else self._ignored).append(os.path.join(below, file))
        return found

    def _is_of_the_source(self, root: str, name: str) -> bool:
        """Whether a folder has images of the source: not a system's, nor any that come otherwise."""
        if name.startswith(".") or name in NOT_OURS:
            return False
        path = os.path.join(root, name)
        if not os.path.islink(path):
            return True
        target = os.path.realpath(path)
        leads_in = os.path.commonpath([target, self._real]) in (target, self._real)
        return not leads_in

    def __len__(self) -> int:
        return len(self._files)

    def read(self, number: int) -> SourceImage:
        """Image `number`, uint8 `[H, W, 3]`."""
        file, label = self._files[number]
        path = self._folder / file
        try:
            with open_regular(path) as stream:
                image = load_pixels(open_image(stream, tuple(sorted(set(FORMATS.values())))))
                return SourceImage(to_array(photograph_to_rgb(image)), label, {"source": file})
        except BadImage as error:
            raise UserError(f"{printable(path)}: {error}") from error
        except OSError as error:
            raise UserError(f"{printable(path)}: could not be read: {error.strerror or error}") from error

    def remarks(self) -> list[str]:
        """The files that are no images."""
        if not self._ignored:
            return []
        shown = ", ".join(ascii(name)[1:-1] for name in self._ignored[:REMARKS_SHOWN])
        more = f" and {len(self._ignored) - REMARKS_SHOWN:,} more" if len(self._ignored) > REMARKS_SHOWN else ""
        *most, last = FORMATS
        why = f"not a {', '.join(most)} or {last} file in a class folder, hidden, or there twice"
        return [f"left out: {shown}{more} ({why})"]


def is_directory(path: str) -> bool:
    """Whether a path leads to a folder. UserError where that cannot be known, but not for a link to nothing."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unreadable(error) from error


def refuse_unreadable(error: OSError) -> None:
    """What a walk does with a folder that it cannot read: its images must not be missed in silence."""
    raise _unreadable(error) from error


def _unreadable(error: OSError) -> UserError:
    return UserError(f"{printable(error.filename)}: could not be read: {error.strerror or error}")
