"""`ditmoe data encode`: images in shards become latents in shards."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from ditmoe.launcher.commands.drawing import IndexOption
from ditmoe.launcher.commands.shared_options import PER_CORE, Sharing, shares_work
from ditmoe.model.outside.text import counted


class Dtype(StrEnum):
    """Number type of the stored moments."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Flips(StrEnum):
    """What becomes of mirror images."""

    none = "none"
    both = "both"
    drawn = "drawn"


class LatentFormat(StrEnum):
    """How moments are stored in shards."""

    safetensors = "safetensors"
    npy = "npy"


class OnError(StrEnum):
    """What becomes of images that cannot be used."""

    stop = "stop"
    skip = "skip"


@shares_work(PER_CORE)
def command(
    shards: Annotated[Path, typer.Argument(help="A folder of shards of images.", metavar="SHARDS")],
    out: Annotated[Path, typer.Argument(help="Folder to write shards of latents to.", metavar="OUT")],
    *,
    vae: Annotated[Path, typer.Option(help="Local folder of a diffusers AutoencoderKL with safetensors weights.")],
    dtype: Annotated[Dtype, typer.Option(help="Number type of the stored moments.")] = Dtype.float16,
    flips: Annotated[
        Flips, typer.Option(help="Mirror images: store none, both, or one of the two by a coin toss.")
    ] = Flips.none,
    format: Annotated[
        LatentFormat, typer.Option(help="Format of the stored latents; npy has no bfloat16.")
    ] = LatentFormat.safetensors,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the coin tosses of --flips drawn.")] = 0,
    batch: Annotated[
        int, typer.Option(min=1, help="Images through the VAE at once on a GPU; a CPU takes one at a time.")
    ] = 16,
    sharing: Sharing,
    device: Annotated[
        str | None, typer.Option(help="cpu, or cuda: a GPU for each process. [default: cuda if there is one]")
    ] = None,
    index: IndexOption = None,
    on_error: Annotated[
        OnError, typer.Option(help="If an image cannot be used: stop, or leave it out (up to 1,000).")
    ] = OnError.stop,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a dataset that is already in OUT.")
    ] = False,
) -> None:
    """Encode images into the moments of their latents, shard for shard.

    Repeat the command to resume it. Workers on other machines that see all folders can join through --crew, or
    you start the same command there. Under torchrun and srun it uses their processes.

    Examples:
        ditmoe data encode shards/photos shards/latents --vae sd-vae
        ditmoe data encode shards/photos shards/latents --vae sd-vae --flips both --processes 8
    """
    from ditmoe.data.encoding.by_crew import made_by
    from ditmoe.data.encoding.encode import encode
    from ditmoe.data.encoding.plan import EncodeSettings, prepare_encoding
    from ditmoe.data.encoding.vae import read_facts
    from ditmoe.data.shards.index import load_index
    from ditmoe.data.storage.progress import show_progress
    from ditmoe.launcher.local.signs import signs_of_work
    from ditmoe.model.errors import UserError
    from ditmoe.parallel.ranks import own_device, this_process

    process = this_process()
    if overwrite and process.ranks > 1:
        raise UserError("--overwrite under torchrun or srun: expected it left out, and OUT removed beforehand")
    settings = EncodeSettings(dtype.value, flips.value, format.value, seed, batch, overwrite, on_error.value)
    encoding = prepare_encoding(shards, out, read_facts(vae), settings, index)
    name = choose_device(device, elsewhere=sharing.crew is not None)
    left = encoding.folder.begin(overwrite)
    if not left and not process.started:
        typer.echo(f"{out}: was encoded before; --overwrite encodes it again")
        return
    progress = show_progress("images encoded", encoding.index.total) if process.first else lambda images: None
    if left:
        # Of several nodes each takes its share of the shards.
        most = -(-len(encoding.index.shards) // process.ranks)
        with sharing.led(per_core=True, gpus=name == "cuda", most=most) as crew, signs_of_work(out):
            made = encode(
                encoding,
                own_device(name, "--processes"),
                rank=process.rank,
                ranks=process.ranks,
                make=None if crew is None else made_by(crew, encoding, index, name),
                on_progress=progress,
                log=_say,
            )
    else:  # the other processes were faster than this one's start
        made = load_index(out)
    if process.first:
        typer.echo(
            f"encoded {counted(made.total, 'image')} of {encoding.index.image_size}×{encoding.index.image_size}×"
            f"{encoding.index.channels} into latents of {made.image_size}×{made.image_size}×{made.channels}: "
            f"{len(made.shards):,} shard{'s' if len(made.shards) > 1 else ''}, "
            f"{made.total_bytes / 2**20:,.1f} MiB"
        )
        left_out = sum(map(len, encoding.members)) - made.total
        if left_out:
            typer.echo(f"{left_out:,} image{'s' if left_out > 1 else ''} left out, which cannot be used", err=True)
        typer.echo(f"  dataset  {out}")
        typer.echo(f"  preview  {out / 'preview.png'}  (decoded from the latents)")


def _say(line: str) -> None:
    typer.echo(line, err=True)


def choose_device(asked: str | None, *, elsewhere: bool = False) -> Literal["cpu", "cuda"]:
    """`cpu` or `cuda`. UserError when it is another; or not here, unless other machines may have it."""
    import torch

    from ditmoe.model.errors import UserError

    if asked not in (None, "cpu", "cuda"):
        raise UserError(f"--device {asked}: expected cpu or cuda")
    here = torch.cuda.is_available()
    if asked == "cuda" and not (here or elsewhere):
        raise UserError("--device cuda: this machine shows no GPU; expected cpu")
    return "cuda" if asked == "cuda" or (asked is None and here) else "cpu"
