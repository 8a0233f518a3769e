"""Proof that DeepSpeed steps with the loss's gradient, averaged over micro-steps and ranks, each value in place.

Some of DeepSpeed's settings silently change the gradient. What autograd returns, before DeepSpeed sees it, is
projected on numbers that belong to each parameter's name and place. A projection is linear: those of all
micro-steps and ranks add up to the projection of the sum, so no gradient is kept or sent. It must be the
projection of what AdamW steps with, and the norm of that must be the norm that DeepSpeed reports and clips by.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditmoe.model.canonical import split_experts
from ditmoe.model.errors import UserError
from ditmoe.parallel.engine.fragments import Fragment, published_name
from ditmoe.parallel.engine.initial import canonical_parts
from ditmoe.parallel.engine.pattern import DEVIATION, project
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.processes import gather_objects

CHECKED_STEPS: Final = 2
"""Steps after each start whose gradients are checked."""
FP32: Final = 1e-4
"""Largest difference, as a share of what was added up, where gradients are summed in fp32."""
BF16: Final = 2**-8
"""The same where they are summed in bf16, for each of the √sums."""


class GradientMismatchError(UserError):
    """DeepSpeed stepped with something other than the gradient of the loss; raised on every rank."""


class GradientCheck:
    """Watches one optimiser step.

    Args:
        suspect: what may be the cause of a difference, for the message.
    """

    def __init__(
        self, engine: Any, network: nn.Module, layout: Layout, fragments: Sequence[Fragment], suspect: str
    ) -> None:
        self._engine, self._layout, self._fragments = engine, layout, fragments
        self._expert_rank = layout.expert_rank(dist.get_rank())
        self._suspect = suspect
        device = next(network.parameters()).device
        self._names: dict[str, int] = {}
        """Canonical parameter of this rank → its number."""
        self._groups: list[tuple[Any, list[int]]] = [(engine.data_parallel_group, [])]
        """Process group over which gradients are averaged, and the parameters that this goes for."""
        if layout.expert > 1:
            self._groups.append((engine.expert_data_parallel_group[f"ep_size_{layout.expert}"], []))
        for name, parameter in network.named_parameters():
            for canonical in self._canonical_names(name, parameter):
                is_expert = not getattr(parameter, "allreduce", True)
                self._groups[is_expert][1].append(len(self._names))
                self._names[canonical] = len(self._names)
        self._handed_P2 = torch.zeros(len(self._names), 2, dtype=torch.float64, device=device)
        """Of what autograd handed out: the projection, and the sum of the norms."""
        self._stepped_P = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        """Projection of what AdamW stepped with."""
        self._square = torch.zeros((), dtype=torch.float64, device=device)
        dtypes = {parameter.dtype for parameter in network.parameters()}
        sums = math.sqrt(layout.accumulation + layout.data)
        self._tolerance = FP32 if dtypes == {torch.float32} else BF16 * (1 + sums)
        self._handles: list[Any] = [engine.basic_optimizer.register_step_pre_hook(lambda *_: self._watch_step())]
        for name, parameter in network.named_parameters():
            hook = partial(self._watch, name)
            self._handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]

    def _canonical_names(self, name: str, parameter: Tensor) -> list[str]:
        count = getattr(parameter, "ds_shape", parameter.shape)[0]
        return split_experts(published_name(name), self._expert_rank * count, count) or [published_name(name)]

    @torch.no_grad()
    def _watch(self, name: str, gradient: Tensor) -> None:
        """Project what autograd returns for a parameter in one micro-step."""
        for canonical, part in canonical_parts(published_name(name), gradient, self._expert_rank):
            flat = part.reshape(-1)
            of_parameter_2 = self._handed_P2[self._names[canonical]]
            of_parameter_2[0] += project(canonical, 0, flat)
            of_parameter_2[1] += torch.linalg.vector_norm(flat, dtype=torch.float64)

    @torch.no_grad()
    def _watch_step(self) -> None:
        """Project what AdamW steps with: one flat buffer after the other, each just clipped."""
        groups = self._engine.basic_optimizer.param_groups
        stepped = {id(tensor) for group in groups for tensor in group["params"]}
        for fragment in self._fragments:
            gradient = fragment.gradient()
            if gradient is None or id(fragment.stepped) not in stepped:
                continue
            projection = project(fragment.name, fragment.start, gradient)
            self._stepped_P[self._names[fragment.name]] += projection.to(self._stepped_P.device)
            square = torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2 / fragment.replicas
            self._square += square.to(self._square.device)

    def finish(self, norm: float, clip: float | None) -> None:
        """Compare, after the step; a collective call.

        Args:
            norm: of the global gradient, as the engine reports it.

        Raises:
            GradientMismatchError: on every rank; says by how much which parameters' gradients differ.
        """
        for handle in self._handles:
            handle.remove()
        if not math.isfinite(norm):
            return  # the trainer has a message for that
        scale = 1.0 if clip is None else 1 / max(1.0, (norm + 1e-6) / clip)
        problems = [*self._norm_problems(scale * norm), *self._projection_problems(scale)]
        ranks_with_problems = torch.tensor(float(bool(problems)), device=self._square.device)
        dist.all_reduce(ranks_with_problems)
        if ranks_with_problems:
            named = list(dict.fromkeys(problem for each in gather_objects(problems) for problem in each))
            raise GradientMismatchError(
                f"the gradient that DeepSpeed steps with is not that of the loss: {'; '.join(named[:3])}"
                + (f"; and {len(named) - 3} more" if len(named) > 3 else "")
                + f"; {self._suspect}"
            )

    def _norm_problems(self, expected: float) -> Iterator[str]:
        square = self._square.clone()
        dist.all_reduce(square)
        found = math.sqrt(float(square))
        if abs(found - expected) > max(self._tolerance, 1e-3) * expected:
            yield f"its norm after clipping is {found:.6g}, by the norm that is reported {expected:.6g}"

    def _projection_problems(self, scale: float) -> Iterator[str]:
        names = list(self._names)
        for group, numbers in self._groups:
            sums_P3 = torch.cat((self._handed_P2[numbers], self._stepped_P[numbers, None]), 1)
            if not self._layout.zero:  # each rank of the group steps all of it
                sums_P3[:, 2] /= dist.get_world_size(group)
            dist.all_reduce(sums_P3, group=group)
            for number, (projection, norms, stepped) in zip(numbers, sums_P3.tolist(), strict=True):
                expected, size = (scale * value / self._layout.data for value in (projection, DEVIATION * norms))
                if abs(stepped - expected) > self._tolerance * size:
                    share = abs(stepped - expected) / size if size else math.inf
                    yield f"{names[number]} differs by {share:.1%} of what was added up"
