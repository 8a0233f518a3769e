"""A start from weights of others: a rank reads the boxes that it keeps, and joins nothing to find them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from torch import Tensor

from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.weights.description import Description
from ditmoe.model.weights.diffusers_out import stock_config, to_stock
from ditmoe.model.weights.files import write_safetensors
from ditmoe.model.weights.lazy import read
from ditmoe.model.weights.published import PublishedWeights, save_published
from ditmoe.parallel.checkpoint.checked_files import Readers
from ditmoe.parallel.engine.initial import Part
from tests.parallel.checkpoint.together import Together
from tests.parallel.start.reads import Reads
from tests.parallel.start.test_copied import check, cut_by_columns, cut_flat, started
from tests.parallel.start.test_start import FLOW, network_of

Cut = Callable[[ModelConfig, int, int], list[Part]]

SHAPE: Final[dict[str, Any]] = {
    "depth": 4,
    "hidden": 64,
    "experts": 0,
    "experts_per_token": 0,
    "timestep_frequencies": "diffusers",
}


def stock_folder(folder: Path, network: DiT, described: bool) -> dict[str, Tensor]:
    """Write a network as diffusers' own class has it; what its file holds."""
    state = canonical_state(network)
    tensors = read(to_stock(state, network.config))
    text = Description(network.config, FLOW).text() if described else None
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors, text)
    (folder / "config.json").write_text(json.dumps(stock_config(network.config)))
    return tensors


def stored(path: Path, form: str) -> tuple[DiT, int]:
    """Weights in one form; their network, and the bytes of embedders that one rank compares."""
    network = network_of(**SHAPE, num_classes=1000 if form == "diffusers" else 10)
    if form.startswith("diffusers"):
        tensors = stock_folder(path, network, form == "diffusers, described")
        of_block = sum(
            tensor.nbytes for name, tensor in tensors.items() if name.startswith("transformer_blocks.1.norm1.emb.")
        )
        assert network.config.depth is not None
        return network, 2 * (network.config.depth - 1) * of_block
    save_published(PublishedWeights(network.config, canonical_state(network), objective=FLOW), path)
    return network, 0


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("cut", [cut_flat, cut_by_columns])
@pytest.mark.parametrize("form", ["diffusers", "diffusers, described", "file.safetensors", "file.pt"])
def test_a_rank_reads_what_it_keeps_and_holds_nothing_beside_it(
    tmp_path: Path, form: str, cut: Cut, ranks: int
) -> None:
    path = tmp_path / form
    network, compared = stored(path, form)

    def begin(readers: Readers) -> tuple[list[Part], Reads]:
        parts, reads = cut(network.config, readers.rank, readers.ranks), Reads()
        with reads:
            started(path, network.config, parts, readers)
        return parts, reads

    found = Together(ranks).run(begin)
    positions = network.pos_embed.nbytes
    for rank, (parts, reads) in enumerate(found):
        check(parts, network, network.config)
        kept = sum(part.memory.nbytes for part in parts)
        figures = {"rank": rank, "kept": kept, "read": reads.read, "held": reads.most_held}
        print(json.dumps({"form": form, "cut": cut.__name__, "ranks": ranks, **figures}))
        beside = (compared if rank == 0 else 0) if form.startswith("diffusers") else positions
        assert reads.read == kept + beside
        assert reads.most_held <= 5 * positions, "of the fixed positions, which are computed"


def test_embedders_that_differ_are_told_to_all_by_the_one_that_compares(tmp_path: Path) -> None:
    network = network_of(**SHAPE)
    tensors = stock_folder(tmp_path / "stock", network, described=True)
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    weights = tmp_path / "stock" / "diffusion_pytorch_model.safetensors"
    text = Description(network.config, FLOW).text()
    write_safetensors(weights, {**tensors, name: tensors[name] + 1}, text, overwrite=True)

    def begin(readers: Readers) -> None:
        started(tmp_path / "stock", network.config, cut_flat(network.config, readers.rank, 3), readers)

    for error in Together(3).run(begin):
        assert isinstance(error, UserError) and f"{name} differs from that of block 0" in str(error)
