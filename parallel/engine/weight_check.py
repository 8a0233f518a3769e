"""Proof that each fragment belongs to the parameter that it is named after, before anything is trained or saved.

DeepSpeed keeps the fp32 weights in flat buffers, in an order of its own, and its settings change that order. If a
fragment were taken for another parameter's, training would be right, but checkpoints would hold parameters under
each other's names. Initial values cannot reveal that: many tensors start as zeros. So each fragment gets numbers
that belong to its name and place alone, DeepSpeed updates the network from them as after a step, and each
parameter must then show its own numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditmoe.model.errors import UserError
from ditmoe.parallel.engine.fragments import Fragment, published_name, refresh_weights
from ditmoe.parallel.engine.initial import canonical_parts
from ditmoe.parallel.engine.pattern import stretches
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.processes import gather_objects

_NAMED = 3


@torch.no_grad()
def check_weights(
    engine: Any,
    network: nn.Module,
    layout: Layout,
    fragments: Sequence[Fragment],
    values: Sequence[Tensor],
    suspect: str,
) -> None:
    """Write numbers into all fragments, look for them in the network, and put the values back; a collective call.

    Args:
        values: of the fragments' weights, a copy of each.
        suspect: what may be the cause, for the message.

    Raises:
        UserError: on every rank; names parameters that do not show what was written under their names.
    """
    for fragment in fragments:
        for stretch, numbers in stretches(fragment.name, fragment.start, fragment.weight):
            stretch.copy_(numbers)
    refresh_weights(engine, layout.zero)
    wrong = _differing(network, layout)
    for fragment, value in zip(fragments, values, strict=True):
        fragment.weight.copy_(value)
    refresh_weights(engine, layout.zero)
    names = sorted({name for names in gather_objects(wrong) for name in names})
    if names:
        shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
        raise UserError(
            f"DeepSpeed does not keep the weights where this engine looks for them: {len(names)} parameters"
            f" ({shown}) would stand under other names in checkpoints; {suspect}"
        )


def _differing(network: nn.Module, layout: Layout) -> list[str]:
    """The canonical parameters of this rank that do not show the numbers of their names and places."""
    expert_rank = layout.expert_rank(dist.get_rank())
    wrong = []
    for name, parameter in network.named_parameters():
        with _gathered(parameter):
            for canonical, held in canonical_parts(published_name(name), parameter, expert_rank):
                pairs = stretches(canonical, 0, held.detach().reshape(-1))
                if not all(torch.equal(stretch.float(), numbers) for stretch, numbers in pairs):
                    wrong.append(canonical)
    return wrong


@contextmanager
def _gathered(parameter: Tensor) -> Iterator[None]:
    """With ZeRO 3: all of a parameter on every rank, one at a time."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        yield
