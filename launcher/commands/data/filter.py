"""`ditmoe data filter`: keep the samples with the best scores of each class."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ditmoe.model.outside.text import counted

CLASSES_SHOWN = 100


def command(
    shards: Annotated[Path, typer.Argument(help="A folder of shards with quality scores.", metavar="SHARDS")],
    out: Annotated[Path, typer.Argument(help="Folder to write the kept samples to.", metavar="OUT")],
    keep: Annotated[
        float | None, typer.Option(help="Share of each class to keep, above 0 and up to 1. [default: all]")
    ] = None,
    by: Annotated[
        Literal["score"], typer.Option(help="What decides which are best: the quality score.")
    ] = "score",
    min_score: Annotated[float | None, typer.Option(help="Keep no sample with a lower score.")] = None,
    shard_samples: Annotated[int, typer.Option(min=1, help="Samples in a shard, at most.")] = 1000,
    shard_size: Annotated[int, typer.Option(min=1, help="Size of a shard in MiB, at most.")] = 256,
    name: Annotated[str | None, typer.Option(help="The dataset's name. [default: after SHARDS]")] = None,
    index_at: Annotated[
        Path | None,
        typer.Option("--index", metavar="FOLDER", help="Folder of index.json, if it is not SHARDS."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a dataset that is already in OUT.")
    ] = False,
) -> None:
    """Copy the samples with the highest scores of each class into new shards, and print the lowest score kept.

    Examples:
        ditmoe data filter shards/drawn shards/best --keep 0.5
        ditmoe data filter shards/drawn shards/good --min-score 0.9
    """
    from ditmoe.data.making.filtering import FilterSettings, filter_shards
    from ditmoe.data.shards.writer import ShardLimits
    from ditmoe.model.errors import UserError
    from ditmoe.model.outside.text import is_fit_to_print

    assert by == "score"
    if keep is None and min_score is None:
        raise UserError("neither --keep nor --min-score is given: there is nothing to filter by")
    if name is not None and not (name.strip() and is_fit_to_print(name)):
        raise UserError(f"--name is {name!a}, expected at least one character, and none that cannot be printed")
    limits = ShardLimits(samples=shard_samples, bytes=shard_size * 2**20)
    settings = FilterSettings(1.0 if keep is None else keep, min_score, limits, name, overwrite)
    result = filter_shards(shards, out, settings, index_at)
    index = result.index
    width = max(len(class_name) for class_name in index.class_names)
    for label, figures in list(enumerate(result.classes))[:CLASSES_SHOWN]:
        typer.echo(
            f"{label:5d}  {index.class_names[label]:<{width}}  {figures.kept:9,d} of {figures.samples:9,d}"
            + (f"  score ≥ {figures.threshold:.4g}" if figures.kept else "")
            + (f"  ({figures.without_score:,} without a score)" if figures.without_score else "")
        )
    if index.num_classes > CLASSES_SHOWN:
        typer.echo(f"   …  {counted(index.num_classes - CLASSES_SHOWN, 'more class')}")
    total = sum(figures.samples for figures in result.classes)
    emptied = sum(figures.samples > 0 and not figures.kept for figures in result.classes)
    typer.echo(
        f"kept {counted(index.total, 'sample')} of {total:,} "
        f"in {counted(len(index.shards), 'shard')}, {index.total_bytes / 2**20:,.1f} MiB"
        + (f"; {counted(emptied, 'class')} kept nothing" if emptied else "")
    )
    typer.echo(f"  dataset  {out}")
