"""`ditmoe checkpoint`: look into a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditmoe.launcher.command_line.groups import Commands
from ditmoe.model.outside.text import counted

if TYPE_CHECKING:
    from ditmoe.parallel.checkpoint.folder import CheckpointInfo

app = Commands(
    """Inspect a checkpoint.

    Examples:
        ditmoe checkpoint inspect runs/photos
    """
)


@app.callback()
def _checkpoint() -> None:
    """Look into a checkpoint."""


Source = Annotated[
    Path, typer.Argument(help="A run folder (its newest checkpoint) or a checkpoint folder.", metavar="PATH")
]
Step = Annotated[int | None, typer.Option(min=0, help="The checkpoint of this step of a run.")]


@app.command("inspect", short_help="Show what it holds, and check every byte.")
def inspect(source: Source, step: Step = None) -> None:
    """Print what a checkpoint holds, its sizes and the layout that wrote it, and check every byte.

    Examples:
        ditmoe checkpoint inspect runs/photos
        ditmoe checkpoint inspect runs/photos --step 20000
    """
    from ditmoe.model.errors import UserError
    from ditmoe.parallel.checkpoint.folder import damaged, incomplete, read_info
    from ditmoe.sampling.network.load import find_checkpoint

    info = read_info(find_checkpoint(source, step))
    typer.echo(_description(info))
    problems = damaged(info, info.files) or incomplete(info)
    if problems:
        raise UserError("\n".join(problems))
    typer.echo("\n".join(_cuts(info)))
    typer.echo("whole: each parameter is there once, and every file has its checksum")


def _description(info: "CheckpointInfo") -> str:
    """A checkpoint in lines for a person."""
    from math import prod

    from ditmoe.launcher.commands.models import human

    model = info.model
    kind = model.published_name or f"{counted(model.depth, 'block')} of width {model.hidden}, patch {model.patch}"
    experts = (
        f"{counted(model.experts, 'expert')}, {model.experts_per_token} per token" if model.experts else "dense"
    )
    parameters = human(sum(prod(shape) for shape in info.shapes.values()))
    lines = [
        str(info.path),
        f"  step          {info.step:,}",
        f"  images seen   {info.images:,}",
        f"  model         {kind}, {experts}; {info.objective.kind}",
        f"  parameters    {parameters} in {len(info.shapes):,} tensors",
        f"  data          {info.dataset.get('name', 'unknown')}: {counted(model.num_classes or 0, 'class')}",
        f"  written by    {_layout(info)}",
        f"  started from  {info.started_from['path'] if info.started_from else 'nothing, or not said'}",
        f"  fingerprint   {info.fingerprint[:16]}",
    ]
    for part in info.parts:
        sizes = [facts["bytes"] for name, facts in info.files.items() if name.startswith(f"{part}/")]
        lines.append(f"  {part:<13} {sum(sizes) / 2**20:>12,.1f} MiB in {counted(len(sizes), 'file')}")
    return "\n".join(lines)


def _cuts(info: "CheckpointInfo") -> list[str]:
    """How the ranks that wrote each part had it cut, in lines for a person; the files must not be damaged."""
    from ditmoe.parallel.boxes import matrix_shape
    from ditmoe.parallel.checkpoint.box_storage import stored_boxes

    lines = []
    for part in info.parts:
        stored = stored_boxes(info.path / part)
        columns = {name: matrix_shape(info.shapes[name])[1] for name in stored}
        boxes = sum(map(len, stored.values()))
        cut = sum(len(found) > 1 for found in stored.values())
        by_columns = sum(any(b.columns < columns[name] for b in found) for name, found in stored.items())
        lines.append(
            f"  {part:<13} {boxes:>12,} boxes: {cut:,} of {len(stored):,} tensors in several, "
            f"{by_columns:,} cut within rows"
        )
    return lines


def _layout(info: "CheckpointInfo") -> str:
    if info.layout is None:
        return "ditmoe convert"
    axes = ", ".join(f"{axis} {info.layout[axis]}" for axis in ("pipe", "data", "expert", "tensor"))
    return f"{axes}, ZeRO {info.layout['zero']}"
