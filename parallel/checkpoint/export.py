"""A checkpoint's weights by their published names, read as they are asked for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ditmoe.model.errors import UserError
from ditmoe.model.layers import position_embedding
from ditmoe.model.weights.lazy import LazyTensors
from ditmoe.parallel.checkpoint.box_storage import StoredBoxes, load_pieces, whole_piece
from ditmoe.parallel.checkpoint.folder import CheckpointInfo, damaged, incomplete
from ditmoe.parallel.checkpoint.holds import reading


@contextmanager
def open_weights(info: CheckpointInfo, sets: Sequence[Literal["ema", "weights"]]) -> Iterator[list[LazyTensors]]:
    """Sets of a checkpoint's parameters, float32, with the position embedding that published files have.

    Nothing is read before it is asked for, and the checkpoint stays where it is for the body.

    Raises:
        UserError: the checkpoint has no such set, or is damaged or incomplete.
    """
    for which in sets:
        if which not in info.parts:
            raise UserError(f"{info.path}: has no {which} (found: {', '.join(info.parts)})")
    with reading(info.path):
        names = [name for name in info.files if name.partition("/")[0] in sets]
        problems = damaged(info, names)
        if not problems:
            info = replace(info, stored={part: StoredBoxes.of(info.path / part) for part in sets})
            problems = incomplete(info, sets)
        if problems:
            raise UserError("\n".join(problems))
        yield [_lazy(info, which) for which in sets]


def _lazy(info: CheckpointInfo, which: str) -> LazyTensors:
    model = info.model
    size = model.image_size or info.dataset["image_size"]
    embedding = position_embedding(model.hidden, size // model.patch)
    shapes = {"pos_embed": tuple(embedding.shape), **info.shapes}

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        tensors = {name: torch.empty(shapes[name]) for name in names}
        if "pos_embed" in tensors:
            tensors["pos_embed"].copy_(embedding)
        stored = [name for name in names if name != "pos_embed"]
        pieces = [whole_piece(name, tensors[name]) for name in stored]
        load_pieces(info.path / which, pieces, info.stored[which])
        return tensors

    return LazyTensors(shapes, read)
