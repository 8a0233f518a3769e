"""Chunks that groups of ranks draw: a group takes a chunk as one process would."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.storage.parts import Progress
from ditmoe.parallel.expert_group import ExpertGroup
from ditmoe.sampling.jobs.chunks import ChunkStore, DrawnImages


def draw_pending_together(store: ChunkStore, group: ExpertGroup, on_progress: Progress) -> None:
    """Draw the chunks that are not there yet, side by side with other groups, until all are.

    The first rank of a group takes chunks and writes them; the others draw what it tells them to.

    Args:
        store: its `draw` is called by all ranks of a group at once, with the same arguments.

    Raises:
        UserError: as `ChunkStore.draw_pending`; the other ranks are to be ended then.
    """
    draw = store.draw
    assert draw is not None
    if not group.first:
        while (told := group.hear()) is not None:
            draw(*told)
        return

    def led(numbers: list[int], label_N: NDArray[np.int64]) -> DrawnImages:
        group.tell((numbers, label_N))
        return draw(numbers, label_N)

    replace(store, draw=led).draw_pending(rank=group.number, ranks=group.count, on_progress=on_progress)
    group.tell(None)
