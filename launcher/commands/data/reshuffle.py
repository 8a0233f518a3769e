"""`ditmoe data reshuffle`: deal the samples of a dataset out into new shards."""

from pathlib import Path
from typing import Annotated

import typer

from ditmoe.model.outside.text import counted


def command(
    shards: Annotated[Path, typer.Argument(help="A folder of shards with an index.", metavar="SHARDS")],
    out: Annotated[Path, typer.Argument(help="Folder to write the new shards to.", metavar="OUT")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the new order.")] = 0,
    shard_samples: Annotated[int, typer.Option(min=1, help="Samples in a shard, at most.")] = 1000,
    shard_size: Annotated[int, typer.Option(min=1, help="Size of a shard in MiB, at most.")] = 256,
    name: Annotated[str | None, typer.Option(help="The dataset's name. [default: that of SHARDS]")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a dataset that is already in OUT.")
    ] = False,
) -> None:
    """Copy all samples, byte for byte, into new shards in random order, so that each shard mixes the classes.

    Examples:
        ditmoe data reshuffle imagenet shards/imagenet --seed 1
    """
    from ditmoe.data.making.reshuffle import ReshuffleSettings, class_mix, reshuffle
    from ditmoe.data.shards.sample_table import read_table
    from ditmoe.data.shards.writer import ShardLimits
    from ditmoe.model.errors import UserError
    from ditmoe.model.outside.text import is_fit_to_print

    if name is not None and not (name.strip() and is_fit_to_print(name)):
        raise UserError(f"--name is {name!a}, expected at least one character, and none that cannot be printed")
    limits = ShardLimits(samples=shard_samples, bytes=shard_size * 2**20)
    index = reshuffle(shards, out, ReshuffleSettings(seed, limits, name, overwrite))
    typer.echo(
        f"reshuffled {counted(index.total, 'sample')} "
        f"into {counted(len(index.shards), 'shard')}, {index.total_bytes / 2**20:,.1f} MiB"
    )
    table = read_table(out, index)
    if table is not None:
        mix = class_mix(index, table)
        found = f"{mix.found:.0f} of {counted(mix.classes, 'class')}"
        typer.echo(f"  a batch of 256 has {found} on average, and {mix.fair:.0f} in a fair draw")
    typer.echo(f"  dataset  {out}")
