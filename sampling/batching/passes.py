"""Passes of one shape through a network, whose rows do not depend on each other in a single bit.

Kernels of matrix products and of experts round by the number of rows, and by the place of a row where that number
is no multiple of theirs: in batches of 3, 5 and 7 images of 49 tokens some images depend on their place (float32,
a CPU); in batches of 8, 12, 16 and 32 none was seen to. So every pass has the same number of rows, the last one is
filled up, and whether a row is the same at every place and in any company is tried out on the very network, device
and number of threads that draw. Where it is not, each row gets a pass of its own, at the first place, with copies
of itself: that is the same by construction, and slow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Final, cast

import torch
from torch import Tensor

from ditmoe.sampling.network.denoiser import Network
from ditmoe.sampling.network.pace import SplitNetwork

TRIALS: Final = 12
"""Passes in other company that a network is tried with, beside one for each place."""


@dataclass(eq=False)
class Call:
    """Rows that wait for a pass: one image, or the image and its null class."""

    passes: "Passes"
    input_BCHW: Tensor
    timestep_B: Tensor
    label_B: Tensor
    hidden: bool = False
    """What leaves the last block is asked for, and not what is predicted from it."""
    done: Event = field(default_factory=Event)
    output_BCHW: Tensor | None = None
    error: BaseException | None = None


class Passes:
    """A network that is only ever asked in passes of one shape. For one thread."""

    def __init__(
        self,
        network: Network,
        rows: int,
        shape: tuple[int, int, int],
        classes: int,
        device: torch.device,
        on_pass: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Try the network out.

        Args:
            rows: of a pass.
            shape: (C, H, W) of a row.
            classes: labels below this are known to the network.
            on_pass: called with the rows of each pass that were asked for; not while the network is tried.
        """
        self._network, self._rows, self._on_pass = network, rows, on_pass
        self.together = rows > 1 and self._rows_are_alone(shape, classes, device)
        """Rows of several images share a pass."""

    def run(self, calls: Sequence[Call]) -> None:
        """Answer all calls, each with its output or with what went wrong, which is then the same for all.

        They are of one kind: all of them `hidden`, or none.
        """
        try:
            network = cast(SplitNetwork, self._network).hidden if calls[0].hidden else self._network
            asked = (
                torch.cat([call.input_BCHW for call in calls]),
                torch.cat([call.timestep_B for call in calls]),
                torch.cat([call.label_B for call in calls]),
            )
            size = self._rows if self.together else 1
            outputs = []
            for first in range(0, len(asked[0]), size):
                part = tuple(each[first : first + size] for each in asked)
                outputs.append(self._pass(network, part[0], part[1], part[2]))
                self._on_pass(len(part[0]))
            lengths = [len(call.input_BCHW) for call in calls]
            for call, output_BCHW in zip(calls, torch.split(torch.cat(outputs), lengths), strict=True):
                call.output_BCHW = output_BCHW.clone()
        except BaseException as error:
            for call in calls:
                call.error = error
        finally:
            for call in calls:
                call.done.set()

    def _pass(self, network: Network, input_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        """Up to `rows` rows, filled up with the last one."""
        count = len(input_BCHW)
        place_R = torch.arange(self._rows, device=input_BCHW.device).clamp(max=count - 1)
        return network(input_BCHW[place_R], timestep_B[place_R], label_B[place_R])[:count]

    def _rows_are_alone(self, shape: tuple[int, int, int], classes: int, device: torch.device) -> bool:
        """Whether each of some rows is the same at every place, and whatever the other rows are.

        Tried with what is predicted, which differs where anything on the way to it does.
        """
        rows = self._rows
        random = torch.Generator().manual_seed(0)
        pool = 2 * rows
        input_PCHW = torch.randn(pool, *shape, generator=random).to(device)
        timestep_P = torch.rand(pool, generator=random).to(device)
        label_P = torch.randint(classes, (pool,), generator=random).to(device)
        orders = [(torch.arange(rows) + shift) % pool for shift in range(pool)]
        orders += [torch.randint(pool, (rows,), generator=random) for _ in range(TRIALS)]
        known: dict[int, Tensor] = {}
        with torch.inference_mode():
            for order in orders:
                place_R = order.to(device)
                output = self._pass(self._network, input_PCHW[place_R], timestep_P[place_R], label_P[place_R])
                for row, output_CHW in zip(order.tolist(), output, strict=True):
                    if not torch.equal(known.setdefault(row, output_CHW.clone()), output_CHW):
                        return False
        return True
