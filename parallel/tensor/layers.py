"""Tensor parallelism: tensor ranks share out each layer's heads and widths, with megatron-core's linears.

A layer is cut as in Megatron-LM (Shoeybi et al., arXiv 1909.08053, §3): its first linear map by output, its last
by input. So a rank computes its own heads of attention, or its own part of an MLP's or expert's width, and one
all-reduce sums the results. Everything else (embeddings, modulation, norms, router) is computed by every tensor
rank alike, from the same numbers to the same bits.
"""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from ditmoe.model.experts.moe import Experts, MoE
from ditmoe.model.layers import DenseMlp, PlainAttention, QkNormAttention, SwiGlu
from ditmoe.parallel.tensor.shards import TensorShard, mark

_QKV = 3


def share_out(network: nn.Module) -> None:
    """Replace the layers of a network by this rank's part of them, under the same names and without values yet.

    Args:
        network: a DiT, or any modules of one.
    """
    for module in list(network.modules()):
        if isinstance(module, PlainAttention):
            _share_out_heads(module)
            module.qkv, module.proj = Column(module.qkv, stacked=_QKV), Row(module.proj)
        elif isinstance(module, QkNormAttention):
            _share_out_heads(module)
            module.Wqkv, module.out_proj = Column(module.Wqkv, stacked=_QKV), Row(module.out_proj)
            module.q_norm, module.k_norm = HeadNorm(module.q_norm), HeadNorm(module.k_norm)
        elif isinstance(module, DenseMlp) and isinstance(module.fc1, nn.Linear):  # not yet with its mixture
            module.fc1, module.fc2 = Column(module.fc1), Row(module.fc2)
        for name, child in list(module.named_children()):
            if isinstance(child, MoE):
                setattr(module, name, TensorMoE(child))


def _share_out_heads(attention: PlainAttention | QkNormAttention) -> None:
    assert attention.heads % _ranks() == 0
    attention.heads //= _ranks()


class Column(ColumnParallelLinear):  # type: ignore[misc]
    """This rank's outputs of a linear map; the gradient of its input is summed over the ranks."""

    def __init__(self, linear: nn.Linear, stacked: int = 1, in_region: bool = False) -> None:
        """Take this rank's part of a linear map.

        Args:
            stacked: maps of equal size that are fused in it, each of which is shared out.
            in_region: the input's gradient is summed by who calls it, for several layers at once.
        """
        super().__init__(
            linear.in_features,
            linear.out_features,
            config=_config(),
            init_method=None,
            bias=linear.bias is not None,
            is_expert=in_region,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        mark(self.weight, _shard(-2, stacked))
        if linear.bias is not None:
            mark(self.bias, _shard(-1, stacked))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` → `[..., out / ranks]`."""
        output: Tensor = super().forward(x)[0]
        return output


class Row(RowParallelLinear):  # type: ignore[misc]
    """A linear map of this rank's inputs, summed over the ranks; the bias is whole, and added once."""

    def __init__(self, linear: nn.Linear, in_region: bool = False) -> None:
        """Take this rank's part of a linear map.

        Args:
            in_region: the output is summed by who calls it, for several layers at once, and the bias added then.
        """
        super().__init__(
            linear.in_features,
            linear.out_features,
            config=_config(),
            init_method=None,
            bias=linear.bias is not None,
            input_is_parallel=True,
            skip_bias_add=in_region,
            is_expert=in_region,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        mark(self.weight, _shard(-1))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in / ranks]` → `[..., out]`."""
        output: Tensor = super().forward(x)[0]
        return output


class HeadNorm(nn.LayerNorm):
    """The norm of queries or keys: whole, but each rank sees its own heads alone, so its gradients are summed."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps)
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[B, heads, T, head_dim]`, normalised over the last dim."""
        return F.layer_norm(x, self.normalized_shape, _enter(self.weight), _enter(self.bias), self.eps)


class TensorMoE(MoE):
    """A mixture layer of which each rank holds a part of every expert's width.

    Every rank routes every token alike. What tokens and scores become in the experts is a part of the result, so
    the gradients of both are summed; the parts of the result are summed after they were combined and the shared
    experts' were added: once for the layer, and not for each of a token's experts.
    """

    def __init__(self, moe: MoE) -> None:
        """Take this rank's part of a layer, and everything else of it."""
        nn.Module.__init__(self)
        self.experts_per_token, self.balance = moe.experts_per_token, moe.balance
        self.gate, self.experts, self.shared_experts = moe.gate, moe.experts, moe.shared_experts
        _cut_width(self.experts)
        if self.shared_experts is not None:
            _cut_shared(self.shared_experts)

    def mix(self, x_TD: Tensor, scores_TK: Tensor, selected_TK: Tensor) -> Tensor:
        """The layer's result behind the router, `[T, D]` → `[T, D]`."""
        part_TD = super().mix(_enter(x_TD), _enter(scores_TK), selected_TK)
        summed_TD: Tensor = reduce_from_tensor_model_parallel_region(part_TD, group=_group())
        if isinstance(self.shared_experts, DenseMlp):
            summed_TD = summed_TD + self.shared_experts.fc2.bias
        return summed_TD


def _cut_width(experts: Experts) -> None:
    """Of the stacked tensors `[N, W, D]`, `[N, W, D]` and `[N, D, W]`, keep this rank's part of W."""
    for name, dim in (("gate_proj", -2), ("up_proj", -2), ("down_proj", -1)):
        shard, whole = _shard(dim), getattr(experts, name)
        part = nn.Parameter(whole.new_empty(shard.part_shape(tuple(whole.shape))))
        mark(part, shard)
        setattr(experts, name, part)
    experts.width = len(experts.gate_proj[0])


def _cut_shared(mlp: SwiGlu | DenseMlp) -> None:
    if isinstance(mlp, DenseMlp):
        mlp.fc1, mlp.fc2 = Column(mlp.fc1, in_region=True), Row(mlp.fc2, in_region=True)
        return
    mlp.gate_proj, mlp.up_proj = Column(mlp.gate_proj, in_region=True), Column(mlp.up_proj, in_region=True)
    mlp.down_proj = Row(mlp.down_proj, in_region=True)


def _enter(tensor: Tensor) -> Tensor:
    """The same tensor; its gradient is summed over the ranks, each of which goes on with a part."""
    entered: Tensor = copy_to_tensor_model_parallel_region(tensor, group=_group())
    if entered.requires_grad:
        # Of a gradient that is not contiguous megatron-core would sum a copy, and go on with the part.
        entered.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]
    return entered


def _group() -> torch.distributed.ProcessGroup:
    group: torch.distributed.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def _ranks() -> int:
    return int(parallel_state.get_tensor_model_parallel_world_size())


def _shard(dim: int, stacked: int = 1) -> TensorShard:
    return TensorShard(dim, int(parallel_state.get_tensor_model_parallel_rank()), _ranks(), stacked)


def _config() -> ModelParallelConfig:
    # On the CPU, where the network is built: megatron-core's other way is the current CUDA device.
    return ModelParallelConfig(
        tensor_model_parallel_size=_ranks(), use_cpu_initialization=True, perform_initialization=False
    )
