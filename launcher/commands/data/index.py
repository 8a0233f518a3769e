"""`ditmoe data index`: make tars that others wrote readable where they lie."""

from pathlib import Path
from typing import Annotated

import typer

from ditmoe.model.outside.text import counted

LARGEST_IMAGE = 8192
"""Pixels a side that images may be brought to; what is larger is taken for a slip of the finger."""


def command(
    folder: Annotated[Path, typer.Argument(help="A folder of *.tar with images.", metavar="FOLDER")],
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LARGEST_IMAGE,
            help="Crop the centre and resize to this many pixels a side, when images are read. "
            "[default: all are squares of one size]",
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(help="1 (grey) or 3 (RGB). [default: as the first image; with --image-size 3]"),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Where to find labels: cls, txt, or json:KEY.", show_default="cls", metavar="WHERE"),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(help="File with the name of each class, one per line or a JSON list."),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of classes. [default: the largest label plus one, or the number of names]"
        ),
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="Where to find a quality score: json:KEY. [default: none]", metavar="WHERE")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for index.json and samples.npz, if FOLDER cannot be written. [default: FOLDER]"),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read; 0: this one.")] = 0,
    name: Annotated[str | None, typer.Option(help="The dataset's name. [default: FOLDER's]")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index that is already there.")
    ] = False,
    check_images: Annotated[
        bool,
        typer.Option("--check-images", help="Decode every image, not only the first of each tar."),
    ] = False,
    skip_unreadable: Annotated[
        bool,
        typer.Option(
            "--skip-unreadable",
            help="Leave out and list damaged tars and samples that cannot be used, instead of stopping.",
        ),
    ] = False,
) -> None:
    """Index tars that other programs wrote, such as img2dataset, so that training reads them as they are.

    If there are problems, it lists each by shard and key, writes nothing, and exits with code 2.

    Examples:
        ditmoe data index imagenet --image-size 256 --check-images
        ditmoe data index laion --image-size 256 --label json:label --skip-unreadable
    """
    from ditmoe.data.making.class_names import read_class_names
    from ditmoe.data.making.foreign import ForeignSettings, index_foreign, remarks
    from ditmoe.model.errors import UserError
    from ditmoe.model.outside.text import is_fit_to_print, printable

    if channels not in (None, 1, 3):
        raise UserError(f"--channels is {channels}, expected 1 (grey) or 3 (RGB)")
    if name is not None and not (name.strip() and is_fit_to_print(name)):
        raise UserError(f"--name is {name!a}, expected at least one character, and none that cannot be printed")
    names = None if class_names is None else read_class_names(class_names)
    for remark in remarks(folder):
        typer.echo(remark, err=True)
    result = index_foreign(
        folder,
        ForeignSettings(
            image_size=image_size,
            channels=channels,
            label=label,
            class_names=names,
            num_classes=num_classes,
            score=score,
            out=out,
            workers=workers,
            name=name,
            overwrite=overwrite,
            check_images=check_images,
            skip_unreadable=skip_unreadable,
        ),
    )
    for problem in result.problems:
        typer.echo(printable(problem if result.index is None else f"left out: {problem}"), err=True)
    index = result.index
    if index is None:
        raise UserError(
            f"{folder}: {counted(len(result.problems), 'problem')}, and nothing was written; "
            "--skip-unreadable leaves such tars and samples out"
        )
    if result.problems:
        typer.echo(
            f"{counted(len(index.left_out), 'shard')} and {counted(result.samples_left_out, 'sample')} left out",
            err=True,
        )
    if result.others:
        shown = ", ".join(map(printable, result.others[:5])) + (", …" if len(result.others) > 5 else "")
        entries = counted(len(result.others), "entry", "entries")
        typer.echo(f"ignored: {entries} with neither image nor label: {shown}", err=True)
    if skip_unreadable and not check_images:
        typer.echo("only the first image of each tar was decoded; --check-images decodes all of them", err=True)
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(
        f"indexed {counted(index.total - result.samples_left_out - len(result.others), 'image')}"
        f"{' to be read as' if index.crop else ' of'} {index.image_size}×{index.image_size}×{index.channels} "
        f"in {counted(index.num_classes, 'class')}: "
        f"{counted(len(index.shards), 'shard')}, {index.total_bytes / 2**20:,.1f} MiB"
    )
    typer.echo(f"  index    {(out or folder) / 'index.json'}")
