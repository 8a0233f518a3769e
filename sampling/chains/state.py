"""The state of Denoising Langevin Gibbs chains: plain tensors, kept in a file so that chains can continue.

B chains. Everything random about a chain is drawn from (seed, purpose, (chain, step)), so that a chain is a
function of the seed and its number, whatever chains are computed beside it and wherever it was interrupted.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.model import randomness
from ditmoe.model.errors import UserError
from ditmoe.model.weights.untrusted import parse_json

FORMAT_VERSION: Final = 1
_BESIDE: Final = "beside/"


@dataclass(frozen=True)
class Chains:
    """Where chains are, and what they have cost."""

    x_BCHW: Tensor
    """In the variance-exploding view."""
    sigma_B: Tensor
    """float64."""
    label_B: Tensor
    """Class of each chain, int64."""
    chain_B: Tensor
    """Number of each chain, int64 on the CPU, as all that follow."""
    step_B: Tensor
    """Langevin–Gibbs steps so far, burn-in included; never goes back, also where a chain starts anew."""
    samples_B: Tensor
    """Samples so far."""
    initial_nfe_B: Tensor
    """Evaluations of the denoiser for starting: the integrator and the burn-in."""
    chain_nfe_B: Tensor
    """Evaluations of the denoiser in stretches."""
    finish_nfe_B: Tensor
    """Evaluations of the denoiser for denoising samples."""
    velocity_BCHW: Tensor | None = None
    """Of underdamped steps; null: they are of another kind."""

    def __len__(self) -> int:
        return len(self.chain_B)

    def rows(self, row_R: Tensor) -> "Chains":
        """Some of the chains; rows are int64 on the CPU."""
        return Chains(**{name: tensor[row_R.to(tensor.device)] for name, tensor in self.tensors().items()})

    def with_rows(self, row_R: Tensor, others: "Chains") -> "Chains":
        """These chains with some of them replaced."""
        merged = {name: tensor.clone() for name, tensor in self.tensors().items()}
        for name, tensor in others.tensors().items():
            merged[name][row_R.to(tensor.device)] = tensor
        return Chains(**merged)

    def tensors(self) -> dict[str, Tensor]:
        """What is there, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nfe_B(self) -> Tensor:
        """All evaluations of each chain, int64."""
        return self.initial_nfe_B + self.chain_nfe_B + self.finish_nfe_B

    def nfe_per_sample(self) -> float:
        """All evaluations of the chains so far divided by their samples; infinite before the first."""
        nfe = int(self.nfe_B.sum())
        samples = int(self.samples_B.sum())
        return nfe / samples if samples else float("inf")


class ChainDraws(Protocol):
    """What is random about chains."""

    def normal(self, purpose: str, chain_B: Tensor, step_B: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Standard normal `[B, *shape]`."""
        ...

    def uniform(self, purpose: str, chain_B: Tensor, step_B: Tensor) -> Tensor:
        """From [0, 1), float64 `[B]`."""
        ...


@dataclass(frozen=True)
class SeededDraws:
    """Draws that depend on (seed, purpose, chain, step) alone."""

    seed: int

    def normal(self, purpose: str, chain_B: Tensor, step_B: Tensor, shape: tuple[int, ...]) -> Tensor:
        """As `ChainDraws`, float32 on the CPU."""
        return randomness.normal(self.seed, purpose, _positions(chain_B, step_B), shape)

    def uniform(self, purpose: str, chain_B: Tensor, step_B: Tensor) -> Tensor:
        """As `ChainDraws`, on the CPU."""
        return randomness.uniform(self.seed, purpose, _positions(chain_B, step_B))


@dataclass(frozen=True)
class DrawsOfSeeds:
    """Draws of chains that have seeds of their own, as `SeededDraws` of the seed and number of each has them."""

    chains: Sequence[tuple[int, int]]
    """(seed, number) of the chain that goes by each place."""

    def normal(self, purpose: str, chain_B: Tensor, step_B: Tensor, shape: tuple[int, ...]) -> Tensor:
        """As `ChainDraws`, float32 on the CPU."""
        return torch.cat([draws.normal(purpose, *of, shape) for draws, of in self._each(chain_B, step_B)])

    def uniform(self, purpose: str, chain_B: Tensor, step_B: Tensor) -> Tensor:
        """As `ChainDraws`, on the CPU."""
        return torch.cat([draws.uniform(purpose, *of) for draws, of in self._each(chain_B, step_B)])

    def _each(self, chain_B: Tensor, step_B: Tensor) -> Iterator[tuple[SeededDraws, tuple[Tensor, Tensor]]]:
        for place, step in zip(chain_B.tolist(), step_B.tolist(), strict=True):
            seed, number = self.chains[place]
            yield SeededDraws(seed), (torch.tensor([number]), torch.tensor([step]))


def chains_of_seeds(
    seeds: Sequence[int], image_numbers: Sequence[int], labels: Sequence[int], samples: int
) -> tuple[list[int], DrawsOfSeeds]:
    """Images of chains of several seeds and classes under numbers that tell them apart.

    Args:
        seeds: of each image.
        image_numbers: of each image within its seed.
        labels: of each image.
        samples: S of a chain.

    Returns:
        Image numbers, and what is random about the chains that they are of.
    """
    places: dict[tuple[int, int, int], int] = {}
    numbers = []
    for seed, number, label in zip(seeds, image_numbers, labels, strict=True):
        place = places.setdefault((seed, number // samples, label), len(places))
        numbers.append(place * samples + number % samples)
    return numbers, DrawsOfSeeds([(seed, number) for seed, number, _ in places])


def _positions(chain_B: Tensor, step_B: Tensor) -> list[int]:
    """A position of a stream for each (chain, step): the chain in its high 64 bits, the step in the low ones."""
    return [chain << 64 | step for chain, step in zip(chain_B.tolist(), step_B.tolist(), strict=True)]


def save_chains(path: Path, chains: Chains, identity: str, beside: Mapping[str, Tensor] | None = None) -> None:
    """Write chains as safetensors, whole or not at all; the folder is made.

    Args:
        identity: stands for all that the chains depend on (seed, settings, weights, classifier).
        beside: more to keep with them, by name.

    Raises:
        UserError: the file cannot be written.
    """
    # Copies: chains that have just started share one tensor of zeros, which safetensors refuses.
    state = {name: tensor.cpu().contiguous().clone() for name, tensor in chains.tensors().items()}
    state |= {_BESIDE + name: tensor.cpu().contiguous() for name, tensor in (beside or {}).items()}
    facts = {"version": FORMAT_VERSION, "identity": _digest(identity)}
    make_folder(path.parent)
    with replacing(path) as file:
        file.write(save(state, metadata={"dlg": json.dumps(facts)}))


def load_chains(path: Path, identity: str, device: str | torch.device = "cpu") -> tuple[Chains, dict[str, Tensor]]:
    """Read what `save_chains` wrote: the chains, and what was kept beside them, that on the CPU.

    Raises:
        UserError: the file is not there, is damaged, or is of chains of another identity.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            facts = parse_json(stored.metadata()["dlg"])
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            beside = {
                name.removeprefix(_BESIDE): tensor for name, tensor in found.items() if name.startswith(_BESIDE)
            }
            state = {name: tensor for name, tensor in found.items() if not name.startswith(_BESIDE)}
            required = {field.name for field in fields(Chains) if field.default is MISSING}
            if not required <= state.keys():
                raise KeyError(", ".join(sorted(required - state.keys())))
            if unknown := state.keys() - {field.name for field in fields(Chains)}:
                raise KeyError(", ".join(sorted(unknown)))
        version, found = facts["version"], facts["identity"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no state of chains can be read from it ({error})") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: chains in format {version}, expected {FORMAT_VERSION}; start them anew")
    if found != _digest(identity):
        raise UserError(
            f"{path}: chains of another seed, model, classifier, batch or settings than these; expected the same; "
            "delete it to start them anew"
        )
    on_device = ("x_BCHW", "sigma_B", "label_B", "velocity_BCHW")
    placed = {name: tensor.to(device) if name in on_device else tensor for name, tensor in state.items()}
    return Chains(**placed), beside


def _digest(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()
