"""`ditmoe data`: make, index, filter and verify shards."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ditmoe.launcher.command_line.groups import Commands
from ditmoe.launcher.commands.data import encode, filter, index, reshuffle, synthesize
from ditmoe.launcher.commands.data.index import LARGEST_IMAGE
from ditmoe.model.outside.text import counted

app = Commands(
    """Make shards of images, index, encode, filter and verify them.

    Examples:
        ditmoe data pack PHOTOS shards/photos --image-size 64
        ditmoe data verify shards/photos
    """
)

HISTOGRAM_ROWS = 100


class ImageFormat(StrEnum):
    """How images are encoded in shards."""

    png = "png"
    jpg = "jpg"
    npy = "npy"


@app.command("pack", short_help="Pack images, a folder per class, into shards.")
def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="`digits`, `shapes`, or the path of an image folder (a folder per class) or an .npz",
            metavar="SOURCE",
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="Folder to write shards, index.json and preview.png to.", metavar="OUT")
    ],
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LARGEST_IMAGE,
            help="Crop the centre and resize to this many pixels a side. [default: as they are; shapes: 32]",
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(help="1 (grey) or 3 (RGB). [default: as the source has them; image folders: 3]"),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV, JSON or JSON lines with file, label and perhaps score of each image of the folder SOURCE. "
            "[default: a folder per class]"
        ),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(help="With --labels: file with the name of each class, one per line or a JSON list."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Pack only this many, chosen by the seed. [default: all; shapes: 5000]"),
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Classes of `shapes`, 1 to 60. [default: 10]")] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the order of the samples, and of the images of `shapes`.")
    ] = 0,
    format: Annotated[
        ImageFormat, typer.Option(help="png and npy keep every pixel; jpg (quality 95) is smaller.")
    ] = ImageFormat.png,
    shard_samples: Annotated[int, typer.Option(min=1, help="Samples in a shard, at most.")] = 1000,
    shard_size: Annotated[int, typer.Option(min=1, help="Size of a shard in MiB, at most.")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and encode; 0: this one.")] = 0,
    name: Annotated[str | None, typer.Option(help="The dataset's name. [default: after the source]")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a dataset that is already in OUT.")
    ] = False,
    skip_unreadable: Annotated[
        bool,
        typer.Option(
            "--skip-unreadable", help="Leave out and list images that cannot be used, instead of stopping."
        ),
    ] = False,
) -> None:
    """Pack images and labels into webdataset shards with an index, and draw a contact sheet.

    Examples:
        ditmoe data pack PHOTOS shards/photos --image-size 64
        ditmoe data pack digits shards/digits
        ditmoe data pack PHOTOS shards/photos --labels labels.csv --workers 4
    """
    from ditmoe.data.making.class_names import read_class_names
    from ditmoe.data.making.pack import PackSettings, refuse_overlap
    from ditmoe.data.making.pack import pack as pack_source
    from ditmoe.data.making.sources.opening import open_source
    from ditmoe.data.shards.writer import ShardLimits
    from ditmoe.model.errors import UserError
    from ditmoe.model.outside.text import is_fit_to_print, printable

    if channels not in (None, 1, 3):
        raise UserError(f"--channels is {channels}, expected 1 (grey) or 3 (RGB)")
    if name is not None and not (name.strip() and is_fit_to_print(name)):
        raise UserError(f"--name is {name!a}, expected at least one character, and none that cannot be printed")
    refuse_overlap(source, out, labels, class_names)
    opened = open_source(
        source,
        count=count,
        classes=classes,
        image_size=image_size,
        seed=seed,
        labels=labels,
        class_names=None if class_names is None else read_class_names(class_names),
    )
    if name is not None:
        opened.name = name
    for remark in opened.remarks():
        typer.echo(remark, err=True)
    result = pack_source(
        opened,
        out,
        PackSettings(
            image_size=image_size,
            channels=channels,
            count=count,
            seed=seed,
            format=format.value,
            limits=ShardLimits(samples=shard_samples, bytes=shard_size * 2**20),
            workers=workers,
            overwrite=overwrite,
            skip_unreadable=skip_unreadable,
        ),
    )
    for problem in result.skipped:
        typer.echo(printable(f"left out: {problem}"), err=True)
    index = result.index
    if result.skipped:
        typer.echo(f"{counted(len(result.skipped), 'image')} left out", err=True)
    typer.echo(
        f"packed {counted(index.total, 'image')} of {index.image_size}×{index.image_size}×{index.channels} "
        f"in {counted(index.num_classes, 'class')}: "
        f"{counted(len(index.shards), 'shard')}, {index.total_bytes / 2**20:,.1f} MiB"
    )
    typer.echo(f"  dataset  {out}")
    typer.echo(f"  preview  {result.preview}")


@app.command("verify", short_help="Read every sample; list what is damaged.")
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder of shards.", metavar="FOLDER")],
    index: Annotated[
        Path | None, typer.Option(help="Folder with index.json and samples.npz, if it is not FOLDER.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read shards; 0: this one.")] = 0,
) -> None:
    """Read every sample and list every problem by shard and key; exit with code 2 if there is any.

    Examples:
        ditmoe data verify shards/photos
        ditmoe data verify shards/photos --workers 4
    """
    from ditmoe.data.making.verify import verify as verify_folder
    from ditmoe.model.outside.text import printable

    report = verify_folder(folder, workers, index)
    for problem in report.problems:
        typer.echo(printable(problem))
    facts = report.index
    if report.problems:
        typer.echo(f"{folder}: {counted(len(report.problems), 'problem')}")
        raise typer.Exit(2)
    for row in report.histogram()[:HISTOGRAM_ROWS]:
        typer.echo(row)
    if facts.num_classes > HISTOGRAM_ROWS:
        typer.echo(f"   …  {counted(facts.num_classes - HISTOGRAM_ROWS, 'more class')}")
    what = "images" if facts.latents is None else "latents"
    left_out = facts.total - report.labels.total()
    absent = sum(report.labels[label] == 0 for label in range(facts.num_classes))
    typer.echo(
        f"{folder}: good: {report.labels.total():,} {what} "
        f"of {facts.image_size}×{facts.image_size}×{facts.channels} "
        f"in {counted(len(facts.shards), 'shard')}, {counted(facts.num_classes, 'class')}"
        + (f", {absent:,} of them without {what}" if absent else "")
        + (f"; {counted(left_out, 'sample')} left out" if left_out else "")
    )


app.command("index", short_help="Index tars that other programs wrote; no copy.")(index.command)
app.command("reshuffle", short_help="Copy samples to shards in random order.")(reshuffle.command)
app.command("encode", short_help="Encode images into latents of a VAE.")(encode.command)
app.command("synthesize", short_help="Draw a dataset from a run's network.")(synthesize.command)
app.command("filter", short_help="Keep the best of each class by score.")(filter.command)
