"""Opens a source by what the user calls it."""

from pathlib import Path
from typing import Final

from ditmoe.data.making.sources.base import Source
from ditmoe.model.errors import UserError

BUILT_IN: Final = ("digits", "shapes")
"""Sources that are no files."""


def open_source(
    what: str,
    *,
    count: int | None = None,
    classes: int | None = None,
    image_size: int | None = None,
    seed: int,
    labels: Path | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Source:
    """`digits`, `shapes`, or the path of an npz file or an image folder.

    `classes`, and here `count` and `image_size`, are for `shapes`, which is drawn to order; the packing itself
    crops and limits the others. `labels` is a list of an image folder's labels, `class_names` says what its
    classes are called. UserError for anything else.
    """
    if class_names is not None and labels is None:
        raise UserError("--class-names: expected only with --labels")
    if labels is not None:
        if not Path(what).is_dir():
            raise UserError(f"--labels is {labels}, and {what} is no folder: it lists the images of a folder")
        if classes is not None:
            raise UserError(f"--classes is for the source `shapes`; the classes of {labels} are what they are")
        from ditmoe.data.making.sources.labelled import LabelledFolder

        return LabelledFolder(Path(what), labels, class_names)
    # A source may need a library that the others do not, so each is imported when it is asked for.
    if what == "shapes":
        from ditmoe.data.making.sources.shapes import Shapes

        return Shapes(
            count=5000 if count is None else count,
            classes=10 if classes is None else classes,
            image_size=32 if image_size is None else image_size,
            seed=seed,
        )
    if classes is not None:
        raise UserError(f"--classes is for the source `shapes`; the classes of {what} are what they are")
    if what == "digits":
        from ditmoe.data.making.sources.digits import Digits

        return Digits()
    path = Path(what)
    if path.is_dir():
        from ditmoe.data.making.sources.folder import ImageFolder

        return ImageFolder(path)
    if path.is_file() and path.suffix == ".npz":
        from ditmoe.data.making.sources.npz import Npz

        return Npz(path)
    found = "a file of another kind" if path.exists() else "not there"
    raise UserError(f"{what}: {found}; a source is `digits`, `shapes`, an image folder or an .npz file")
