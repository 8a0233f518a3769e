"""The rank grid: how the processes of a run divide batches, weights and experts among them.

The axes are `pipe`, `data` and `tensor`; the `expert` axis subdivides `data`. Ranks count up along `tensor`
first, then `data`, then `pipe`, as DeepSpeed's and Megatron's grids do. Consecutive data ranks share out one
copy of the experts: with data 4 and expert 2, ranks 0 and 1 hold one copy and ranks 2 and 3 the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from ditmoe.model.outside.text import counted

Axis = Literal["pipe", "data", "tensor"]
AXES: Final[tuple[Axis, ...]] = get_args(Axis)
"""In the order of `Layout.coordinates`, the one that counts slowest first."""

Group = Literal["pipe", "data", "tensor", "expert", "expert copies"]
"""What joins ranks in collectives: an axis, one copy of all the experts, or the copies of the same experts."""
GROUPS: Final[tuple[Group, ...]] = get_args(Group)


@dataclass(frozen=True)
class Layout:
    """The sizes of the axes, and what one step of a rank is made of."""

    pipe: int
    """Pipeline stages."""
    data: int
    """Data-parallel ranks; each reads its own part of a batch."""
    expert: int
    """Ranks that the experts of a block are dealt to; divides `data`."""
    tensor: int
    """Tensor-parallel ranks."""
    zero: int
    """ZeRO stage, 0 to 3."""
    micro_batch: int
    """Samples that a data rank reads at once."""
    accumulation: int
    """Micro-steps of one optimiser step."""
    offload: bool = False
    """Whether the optimiser's state is kept, and stepped, in host memory."""

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return self.pipe * self.data * self.tensor

    @property
    def batch(self) -> int:
        """Samples of one optimiser step, over all ranks."""
        return self.micro_batch * self.data * self.accumulation

    @property
    def expert_copies(self) -> int:
        """Copies of the experts: data ranks that hold, and average the gradients of, the same experts."""
        return self.data // self.expert

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Place of a rank on the (pipe, data, tensor) axes."""
        assert 0 <= rank < self.processes
        return rank // (self.data * self.tensor), rank // self.tensor % self.data, rank % self.tensor

    def stage(self, rank: int) -> int:
        """Place of a rank on the pipe axis."""
        return self.coordinates(rank)[0]

    def data_rank(self, rank: int) -> int:
        """Place of a rank on the data axis: which part of a batch it computes."""
        return self.coordinates(rank)[1]

    def tensor_rank(self, rank: int) -> int:
        """Place of a rank on the tensor axis: which part of the heads and widths it holds."""
        return self.coordinates(rank)[2]

    def group(self, rank: int, *axes: Axis) -> list[int]:
        """The ranks that a collective over these axes joins with a rank: they differ from it on no other axis."""
        own = self.coordinates(rank)
        fixed = [place for place, axis in enumerate(AXES) if axis not in axes]
        return [
            other
            for other in range(self.processes)
            if all(self.coordinates(other)[place] == own[place] for place in fixed)
        ]

    def size(self, group: Group) -> int:
        """Ranks in each group of a kind."""
        sizes: dict[Group, int] = {
            "pipe": self.pipe,
            "data": self.data,
            "tensor": self.tensor,
            "expert": self.expert,
            "expert copies": self.expert_copies,
        }
        return sizes[group]

    def stride(self, group: Group) -> int:
        """Distance between neighbours in each group of a kind, in ranks."""
        strides: dict[Group, int] = {
            "pipe": self.data * self.tensor,
            "data": self.tensor,
            "tensor": 1,
            "expert": self.tensor,
            "expert copies": self.expert * self.tensor,
        }
        return strides[group]

    def members(self, rank: int, group: Group) -> range:
        """The ranks of the group of a kind that a rank is in, itself included."""
        assert 0 <= rank < self.processes
        size, stride = self.size(group), self.stride(group)
        first = rank - rank // stride % size * stride
        return range(first, first + size * stride, stride)

    def expert_rank(self, rank: int) -> int:
        """Place of a rank on the expert axis: which part of the experts it holds."""
        return self.data_rank(rank) % self.expert

    def expert_ranks(self, rank: int) -> list[int]:
        """The ranks that share out one copy of the experts with this one."""
        return list(self.members(rank, "expert"))

    def expert_copy_ranks(self, rank: int) -> list[int]:
        """The ranks that hold the same experts as this one."""
        return list(self.members(rank, "expert copies"))

    def expert_slice(self, rank: int, experts: int) -> range:
        """Global ids of the experts that a rank holds, of `experts` in each block."""
        assert experts % self.expert == 0
        held = experts // self.expert
        first = self.expert_rank(rank) * held
        return range(first, first + held)

    def picture(self, experts: int, stages: Sequence[range]) -> str:
        """The grid as text: a line per group of ranks that hold one copy of all the experts.

        Of many stages, copies or ranks it shows the first, and of stages and ranks the last.

        Args:
            experts: routed experts N of each block; 0 for a dense network.
            stages: numbers of each stage's blocks.
        """
        lines = [
            f"{counted(self.processes, 'process')} = pipe {self.pipe} × data {self.data} × tensor {self.tensor}"
            f"; expert {self.expert} (subdivides data), ZeRO {self.zero}",
            f"batch {self.batch} = micro_batch {self.micro_batch} × data {self.data}"
            f" × accumulation {self.accumulation}",
        ]
        if self.pipe > 1:
            held = [f"{blocks[0]}–{blocks[-1]}" if len(blocks) > 1 else str(blocks[0]) for blocks in stages]
            lines.append("blocks of the stages: " + " | ".join(held))
        if not experts:
            return "\n".join([*lines, *self._stage_lines()])
        shown = self.expert_copies if self.expert_copies <= 8 else 4
        for stage in _shown(self.pipe):
            if stage is None:
                lines.append("…")
                continue
            for copy in range(shown):
                cells = [
                    "…" if e is None else self._expert_cell(stage, copy * self.expert + e, experts)
                    for e in _shown(self.expert)
                ]
                lines.append(f"stage {stage}, copy {copy} of the experts: " + " | ".join(cells))
            if shown < self.expert_copies:
                lines.append(f"stage {stage}, copies {shown} to {self.expert_copies - 1}: likewise")
        return "\n".join(lines)

    def _stage_lines(self) -> list[str]:
        """One line per pipeline stage of a dense network: its ranks."""
        size = self.data * self.tensor
        return [
            "…"
            if stage is None
            else f"stage {stage}: rank {stage * size}" + (f" to {(stage + 1) * size - 1}" if size > 1 else "")
            for stage in _shown(self.pipe)
        ]

    def _expert_cell(self, stage: int, data_rank: int, experts: int) -> str:
        """`rank 3: experts 4–7`."""
        first = (stage * self.data + data_rank) * self.tensor
        ranks = f"rank {first}" if self.tensor == 1 else f"ranks {first}–{first + self.tensor - 1}"
        held = self.expert_slice(first, experts)
        ids = f"expert {held[0]}" if len(held) == 1 else f"experts {held[0]}–{held[-1]}"
        return f"{ranks}: {ids}"


def _shown(count: int) -> list[int | None]:
    """The numbers from 0 that a picture shows; null stands for those that it leaves out."""
    return list(range(count)) if count <= 16 else [*range(8), None, count - 1]
