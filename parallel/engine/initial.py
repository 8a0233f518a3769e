"""Initial weights on a layout: each rank has memory for what it keeps alone, and makes the values of that.

A network is built on the meta device. Nothing is written to the memory that it is given here, so on a CPU it
takes none; experts are then dealt out, and with ZeRO 3 each parameter is cut before the next one has memory.
Values are made for the fp32 weights of the optimiser, as a checkpoint's are read into them. In bf16 the network
computes with these, rounded; neither the optimiser's nor the EMA's are.
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ditmoe.model.canonical import split_experts
from ditmoe.model.dit import DiT
from ditmoe.model.layers import position_embedding
from ditmoe.parallel.boxes import Box, Placement, boxes_of_run, matrix_shape, whole
from ditmoe.parallel.engine.fragments import Fragment
from ditmoe.parallel.layout import Layout

MOST_THREADS: Final = 4
"""That make values."""


@dataclass(frozen=True)
class Part:
    """What a rank keeps of a canonical parameter."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    placement: Placement
    """What this rank's tensor is of it."""
    start: int
    """Of the elements of that tensor, flattened, the first that is kept."""
    memory: Tensor
    """fp32 `[length]`, on any device."""

    def boxes(self) -> Iterator[tuple[Box, Tensor]]:
        """The boxes of the parameter, each with its memory `[box.rows, box.columns]`."""
        for offset, box in boxes_of_run(self.placement, self.start, self.memory.numel()):
            yield box, self.memory[offset : offset + box.size].view(box.rows, box.columns)


class Initial(Protocol):
    """Where the first values of a network are from; on every layout, in every precision, they are the same."""

    def fill(self, parts: Sequence[Part]) -> None:
        """Give the memory of all parts that this rank keeps their values; every rank calls it once."""


@dataclass(frozen=True)
class WholeValues:
    """Values that are made whole, of which a rank then keeps its part."""

    value: Callable[[str, tuple[int, ...]], Tensor]
    """Name and shape of a canonical parameter → its value; called in several threads."""

    def fill(self, parts: Sequence[Part]) -> None:
        """Make the value of each part's parameter."""
        in_threads(self._fill, parts)

    def _fill(self, part: Part) -> None:
        value_RC = self.value(part.name, part.shape).view(matrix_shape(part.shape))
        for box, memory_RC in part.boxes():
            memory_RC.copy_(value_RC[box.slices])


Work = TypeVar("Work")


def in_threads(do: Callable[[Work], None], works: Iterable[Work]) -> None:
    """Do some work in a few threads; what the first of them raises is raised."""
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        for _ in threads.map(torch.no_grad()(do), works):
            pass


def give_memory(network: DiT, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter memory on the CPU, to which nothing is written, and fixed tensors their values.

    Args:
        dtype: of the parameters.
        device: where the network will compute.
    """
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            memory = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
            memory.__dict__.update(parameter.__dict__)  # what tensor ranks say of their parts
            setattr(module, name, memory)
    if network.has_first:
        config = network.config
        assert config.image_size is not None
        network.pos_embed = position_embedding(config.hidden, config.image_size // config.patch).to(device)


def cut_for_zero_3(network: nn.Module, layout: Layout, settings: dict[str, Any], grid: Any) -> Any:
    """Leave this rank its part of each parameter but for those that DeepSpeed's expert layers take, as they do.

    Returns:
        a function that leaves this rank its part of further parameters.
    """
    from deepspeed import zero
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    class Cut(zero.Init):  # type: ignore[misc]
        """DeepSpeed's, for parameters without values: nothing is sent around, and no two are whole at a time."""

        def _convert_to_zero_parameters(self, param_list: Any) -> None:
            for parameter in param_list:
                if not is_zero_param(parameter):
                    self._zero_init_param(parameter)

        def _zero_init_param(self, param: Any) -> None:
            param.data = torch.empty(param.shape, dtype=param.dtype, device=self.local_device)
            self._convert_to_deepspeed_param(param)
            param.partition()

    replaced = (".moe.experts.", ".moe.gate.") if layout.expert > 1 else ()
    kept = [p for name, p in network.named_parameters() if not any(part in name for part in replaced)]
    cut = Cut(
        module=nn.ParameterList(kept),
        data_parallel_group=None if grid is None else grid.get_data_parallel_group(),
        dtype=kept[0].dtype,
        config_dict_or_path=copy.deepcopy(settings),
        mpu=grid,
    )
    return cut._convert_to_zero_parameters


def give_zeros(network: nn.Module) -> None:
    """Give every parameter that this rank holds, or its part of it, a value; the optimiser's are written later."""
    for parameter in network.parameters():
        getattr(parameter, "ds_tensor", parameter).detach().zero_()  # ZeRO 3 fills up the last rank's part


def fill(fragments: Sequence[Fragment], initial: Initial) -> None:
    """Give the fp32 weights that this rank's optimiser owns the initial values of their canonical names."""
    initial.fill([Part(f.name, f.shape, f.placement or whole(f.shape), f.start, f.weight) for f in fragments])


def canonical_parts(name: str, parameter: Tensor, expert_rank: int) -> Iterator[tuple[str, Tensor]]:
    """A parameter as this rank holds it, or each of its experts, by canonical name."""
    experts = split_experts(name, expert_rank * parameter.shape[0], parameter.shape[0])
    if experts is None:
        yield name, parameter
    else:
        yield from zip(experts, parameter, strict=True)
