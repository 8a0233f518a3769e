"""What each evaluation of a sampler takes: whether it is guided, and whether the blocks are asked or foretold.

A sampler whose evaluations are a fixed sequence can be told in advance what each of them does, by the numbers of
its steps alone. So an image has the same bits in any batch, and what it costs is known before it is drawn.

Foretelling is that of TaylorSeer (arXiv 2503.06923): what the last block gives the final layer changes smoothly
from step to step, and is extrapolated through what it gave at the last full steps. Finite differences of those and
the Taylor series made of them are one polynomial, the one through them, which is evaluated here as Lagrange wrote
it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Evaluation(NamedTuple):
    """One evaluation of the denoiser."""

    step: int
    """The step that it is in."""
    stage: int
    """Its place within the step: what it is compared with are those of the same place in other steps."""
    guided: bool
    """The null class is asked too."""
    full: bool
    """The blocks are asked; else what they give is foretold."""


class Passes(NamedTuple):
    """What an image costs: passes through the network, of which guidance takes two for each evaluation."""

    full: float
    cached: float
    """Of those whose blocks are foretold, which cost next to nothing."""


@dataclass(frozen=True)
class Pace:
    """What every evaluation of a sampler takes."""

    evaluations: int
    """Of the integrator; what comes after them (Tweedie's formula) is full."""
    stages: int
    """Evaluations of a step; the last step may have fewer."""
    guided: Sequence[bool]
    """Of each step, and of what comes after the last."""
    full: Sequence[bool]
    order: int
    """Of the polynomial."""
    caches: bool
    """Some steps may be foretold."""

    def __getitem__(self, number: int) -> Evaluation:
        """The evaluation of a number."""
        if number >= self.evaluations:
            return Evaluation(len(self.full) - 1, 0, self.guided[-1], full=True)
        step, stage = divmod(number, self.stages)
        return Evaluation(step, stage, self.guided[step], self.full[step])

    def passes(self, *, after: int = 0) -> Passes:
        """What an image costs, with so many evaluations after the integrator's."""
        full = cached = 0
        for evaluation in self._all(after):
            rows = 2 if evaluation.guided else 1
            full, cached = (full + rows, cached) if evaluation.full else (full, cached + rows)
        return Passes(full, cached)

    def _all(self, after: int) -> Iterator[Evaluation]:
        return (self[number] for number in range(self.evaluations + after))


def full_steps(guided: Sequence[bool], interval: int, order: int) -> list[bool]:
    """Which steps are full: the first order + 1 of them, and every `interval`-th from there on.

    Where guidance sets in, nothing is known of the null class, and it begins anew.
    """
    full: list[bool] = []
    since = 0
    for step, here in enumerate(guided):
        if here and step and not guided[step - 1]:
            since = 0
        full.append(since <= order or (since - order) % interval == 0)
        since += 1
    return full


class SplitNetwork(Protocol):
    """A network that can be asked for the blocks and for what follows them apart."""

    def hidden(self, x_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        """What leaves the last block, `[B, T, D]`."""

    def predict_hidden(self, x_BTD: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        """The prediction from it, `[B, C or 2C, H, W]`."""


class Forecast:
    """Foretells what leaves the last block from what left it before. For one batch.

    Rows of a batch are of its images, and under guidance of the same images again, of the null class.
    """

    def __init__(self, network: SplitNetwork, order: int) -> None:
        self._network, self._order = network, order
        self._known: dict[int, list[tuple[int, Tensor]]] = {}
        """Of each stage: numbers of the last full steps, and what left the last block."""

    def predict(self, evaluation: Evaluation, input_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        """The network's prediction, from its blocks or without them."""
        known = self._known.setdefault(evaluation.stage, [])
        rows = len(label_B)
        if evaluation.full:
            hidden_BTD = self._network.hidden(input_BCHW, timestep_B, label_B)
            if known and len(known[-1][1]) < rows:
                known.clear()  # guidance sets in
            known.append((evaluation.step, hidden_BTD))
            del known[: -self._order - 1]
        else:
            weights = extrapolation([step for step, _ in known], evaluation.step)
            terms = [weight * of_step[:rows].float() for weight, (_, of_step) in zip(weights, known, strict=True)]
            total_BTD = terms[0]
            for term_BTD in terms[1:]:
                total_BTD = total_BTD + term_BTD
            hidden_BTD = total_BTD.to(known[0][1].dtype)
        return self._network.predict_hidden(hidden_BTD, timestep_B, label_B)


def extrapolation(nodes: Sequence[int], at: int) -> list[float]:
    """Weights of a function's values at the nodes that give the polynomial through them at a place."""
    weights = []
    for node in nodes:
        weight = 1.0
        for other in nodes:
            if other != node:
                weight *= (at - other) / (node - other)
        weights.append(weight)
    return weights
