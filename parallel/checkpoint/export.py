"""Writing a checkpoint's weights or EMA as safetensors, one file's worth of tensors in memory at a time."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ditmoe.model.errors import UserError
from ditmoe.model.layers import position_embedding
from ditmoe.model.weights.files import SAFETENSORS, SHARD_BYTES, write_safetensors_in_pieces
from ditmoe.parallel.checkpoint.box_storage import load_pieces, whole_piece
from ditmoe.parallel.checkpoint.folder import CheckpointInfo, damaged, incomplete
from ditmoe.parallel.checkpoint.holds import reading

BYTES = 4


def export_weights(
    info: CheckpointInfo,
    destination: Path,
    which: Literal["ema", "weights"] = "ema",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Export one set of a checkpoint's parameters by their published names, fp32.

    Args:
        destination: NAME.safetensors; cut into NAME-00001-of-….safetensors and an index beyond `shard_bytes`.
        progress: called with the bytes written after each file's tensors are read.

    Returns:
        the files written; the last is the one to read.

    Raises:
        UserError: the checkpoint has no such set, is damaged or incomplete, or the files cannot be written.
    """
    if destination.suffix != SAFETENSORS:
        raise UserError(f"{destination}: expected a name that ends in {SAFETENSORS}")
    if which not in info.parts:
        raise UserError(f"{info.path}: has no {which} (found: {', '.join(info.parts)})")
    problems = damaged(info, [name for name in info.files if name.startswith(f"{which}/")]) or incomplete(info)
    if problems:
        raise UserError("\n".join(problems))
    model = info.model
    assert model.image_size is not None
    embedding = position_embedding(model.hidden, model.image_size // model.patch)
    shapes = {"pos_embed": tuple(embedding.shape), **info.shapes}
    written = 0

    def fetch(names: list[str]) -> dict[str, Tensor]:
        nonlocal written
        tensors = {name: torch.empty(shapes[name]) for name in names}
        stored = [name for name in names if name != "pos_embed"]
        if "pos_embed" in tensors:
            tensors["pos_embed"].copy_(embedding)
        load_pieces(info.path / which, [whole_piece(name, tensors[name]) for name in stored], collective=False)
        written += sum(tensor.numel() * BYTES for tensor in tensors.values())
        if progress is not None:
            progress(written)
        return tensors

    sizes = {name: BYTES * math.prod(shape) for name, shape in shapes.items()}
    with reading(info.path):
        return write_safetensors_in_pieces(destination, sizes, fetch, shard_bytes=shard_bytes)
