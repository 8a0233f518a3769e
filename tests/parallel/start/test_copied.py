"""Values that are copied: those of the plain rule, whichever parts ranks keep, and no byte is read for nothing."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from ditmoe.model.canonical import canonical_shapes, canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.initialise import initial_value
from ditmoe.model.weights.published import PublishedWeights, save_published
from ditmoe.model.weights.transfer import plan_transfer
from ditmoe.parallel.boxes import column_slice, row_slices, whole
from ditmoe.parallel.checkpoint.box_storage import Piece, keyed
from ditmoe.parallel.checkpoint.checked_files import ALONE, Readers
from ditmoe.parallel.checkpoint.folder import write_marker
from ditmoe.parallel.checkpoint.shard_files import header_of
from ditmoe.parallel.engine.initial import Part
from ditmoe.parallel.start.copied import Copied
from ditmoe.parallel.start.fresh import Fresh
from ditmoe.parallel.start.source import Start, opened
from tests.model.weights.whole_transfer import transferred
from tests.parallel.checkpoint.together import Together, counted_by
from tests.parallel.start.test_start import FLOW, SOURCES, network_of
from tests.parallel.test_boxes import facts_of

TARGETS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "the same": ("mixture", {}),
    "other classes": ("mixture", {"num_classes": 4}),
    "more shared experts": ("mixture", {"shared_experts": 3}),
    "from dense": ("dense", {"shared_mlp": "gelu"}),
    "from one expert": ("single", {"experts": 3, "experts_per_token": 2, "shared_experts": 3}),
}
"""What starts → its source, and its network."""


def target_of(name: str) -> tuple[DiT, ModelConfig]:
    """The source, and the network that starts from it."""
    source, changes = TARGETS[name]
    return network_of(**SOURCES[source]), network_of(**{**SOURCES["mixture"], **changes}).config


def write_source(path: Path, network: DiT, ranks: int) -> None:
    """A checkpoint that some ranks wrote, each parameter cut flat over all of them."""
    state = {name: tensor for name, tensor in canonical_state(network).items() if name != "pos_embed"}
    partial = path.with_name(f"{path.name}.partial")
    files = {}
    for part in ("weights", "ema"):
        (partial / part).mkdir(parents=True)
        for rank in range(ranks):
            pieces = keyed(list(pieces_of(state, rank, ranks)))
            file = partial / part / f"shard-{rank + 1:05d}.safetensors"
            header = header_of({key: piece.box for key, piece in pieces.items()})
            file.write_bytes(header + b"".join(piece.tensor.numpy().tobytes() for piece in pieces.values()))
            files[f"{part}/{file.name}"] = facts_of(file)
    config = network.config
    facts = {
        "step": 0,
        "images": 0,
        "sums": {},
        "parts": ["weights", "ema"],
        "config": {"model": config.model_dump(mode="json"), "objective": FLOW.model_dump(mode="json")},
        "dataset": {
            "name": "converted",
            "image_size": config.image_size,
            "channels": config.channels,
            "num_classes": config.num_classes,
            "class_names": [str(number) for number in range(config.num_classes or 0)],
        },
        "shapes": {name: list(tensor.shape) for name, tensor in state.items()},
    }
    write_marker(partial, facts, files, path)


def pieces_of(state: dict[str, Tensor], rank: int, ranks: int) -> Any:
    for name, tensor in state.items():
        shape, size = tuple(tensor.shape), tensor.numel()
        first, last = size * rank // ranks, size * (rank + 1) // ranks
        part = Part(name, shape, whole(shape), first, tensor.reshape(-1)[first:last])
        for box, memory_RC in part.boxes():
            yield Piece(name, shape, box, memory_RC)


def cut_flat(config: ModelConfig, rank: int, ranks: int, dtype: torch.dtype = torch.float32) -> list[Part]:
    """What a rank of ZeRO 3 keeps, with the experts dealt to two halves of the ranks where there are two."""
    parts = []
    for name, shape in kept(config).items():
        number, size = name.partition(".experts.")[2].partition(".")[0], torch.Size(shape).numel()
        place, cuts = rank, ranks
        if number and ranks > 1:
            if int(number) * 2 // max(config.experts or 0, 1) != rank % 2:
                continue
            place, cuts = rank // 2, ranks // 2
        first, last = size * place // cuts, size * (place + 1) // cuts
        if first < last:
            parts.append(Part(name, shape, whole(shape), first, torch.full((last - first,), 7.0, dtype=dtype)))
    return parts


def cut_by_columns(config: ModelConfig, rank: int, ranks: int, dtype: torch.dtype = torch.float32) -> list[Part]:
    """What a tensor rank keeps: rows of queries, keys and values, columns of what follows, and the rest whole."""
    parts = []
    for name, shape in kept(config).items():
        placement = whole(shape)
        if ".qkv." in name:
            placement = row_slices(shape, rank, ranks, parts=3)
        elif name.endswith("down_proj.weight"):
            placement = column_slice(shape, rank, ranks)
        size = sum(box.size for box in placement)
        parts.append(Part(name, shape, placement, 0, torch.full((size,), 7.0, dtype=dtype)))
    return parts


def kept(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in canonical_shapes(config).items() if name != "pos_embed"}


def started(path: Path, config: ModelConfig, parts: Sequence[Part], readers: Readers = ALONE) -> None:
    """Fill parts of a network that starts from what lies there."""
    start = Start(path, None, None, config, ObjectiveConfig())
    with opened(start, readers) as source:
        Copied(plan_transfer(source.config, config, "source"), source, Fresh(3)).fill(parts)


def check(parts: Sequence[Part], source: DiT, config: ModelConfig) -> None:
    """Every part has the numbers of the plain rule, which makes each parameter whole."""
    values = plan_transfer(source.config, config, "source")
    state = canonical_state(source)
    initial = transferred(values, state.__getitem__, lambda name, shape: initial_value(name, shape, 3))
    for part in parts:
        (box,) = whole(part.shape)
        expected_RC = initial(part.name, part.shape).reshape(box.rows, box.columns).to(part.memory.dtype)
        for box, memory_RC in part.boxes():
            assert torch.equal(memory_RC, expected_RC[box.slices]), part.name


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("cut", "dtype"), [(cut_flat, torch.bfloat16), (cut_by_columns, torch.float32)])
def test_parts_have_the_values_of_the_plain_rule(tmp_path: Path, name: str, cut: Any, dtype: torch.dtype) -> None:
    """From a checkpoint, by several readers, and from a file, by each for itself."""
    source, config = target_of(name)
    write_source(tmp_path / "source", source, 3)
    published = PublishedWeights(source.config, canonical_state(source), objective=FLOW)
    save_published(published, tmp_path / "source.safetensors")

    def read(readers: Readers) -> list[Part]:
        parts: list[Part] = cut(config, readers.rank, readers.ranks, dtype)
        started(tmp_path / "source", config, parts, readers)
        return parts

    for parts in Together(4).run(read):
        check(parts, source, config)
    for rank in range(4):
        parts = cut(config, rank, 4, dtype)
        started(tmp_path / "source.safetensors", config, parts)
        check(parts, source, config)


@pytest.mark.parametrize(
    ("name", "wrote", "reads"),
    [*((name, 3, 4) for name in TARGETS), ("the same", 4, 4), ("from one expert", 8, 4)],
)
def test_a_rank_reads_its_files_and_of_the_others_what_it_keeps(
    tmp_path: Path, name: str, wrote: int, reads: int
) -> None:
    """Each file once for its checksum, by one rank, which takes what it keeps in the same pass; by others the
    boxes that they keep, each once, also where several experts are copies of one."""
    source, config = target_of(name)
    write_source(tmp_path / "source", source, wrote)
    of_rank = [cut_flat(config, rank, reads) for rank in range(reads)]
    with counted_by(lambda file: (threading.current_thread().name, file)) as found:
        Together(reads).run(lambda readers: started(tmp_path / "source", config, of_rank[readers.rank], readers))
    files = {f"ema/{file.name}": file.stat().st_size for file in (tmp_path / "source" / "ema").iterdir()}
    read = {key: count for key, count in found.items() if not key[1].endswith(".json")}
    assert {file for _, file in read} == files.keys(), "of the set that is not asked for nothing is read"
    values = plan_transfer(source.config, config, "source")
    shapes, whole_parameters = kept(source.config), 0
    for rank, parts in enumerate(of_rank):
        mine, wanted = f"reader {rank}", {key: torch.zeros(shape) for key, shape in shapes.items()}
        for part in parts:
            value = values[part.name]
            if value.source is None:
                continue
            whole_parameters += 4 * wanted[value.source].numel()
            there = wanted[value.source].view(len(wanted[value.source]), -1)
            for box, _ in part.boxes():
                rows, columns = box.slices
                if value.kept == "last row":
                    if box.row + box.rows == part.shape[0]:
                        there[-1, columns] = 1
                else:
                    there[rows, columns] = 1
        for number, file in enumerate(sorted(files)):
            if number * reads // wrote == rank:
                assert read[mine, file] == files[file]
                continue
            needed = 0
            for tensor in wanted.values():
                first, last = tensor.numel() * number // wrote, tensor.numel() * (number + 1) // wrote
                needed += 4 * int(tensor.view(-1)[first:last].sum())
            assert read.get((mine, file), 0) == needed, (mine, file)
    # What reading parameters whole, one by one, would have taken beside the checksums.
    before, now = sum(files.values()) + whole_parameters, sum(read.values())
    print(json.dumps({"start": name, "files": wrote, "ranks": reads, "whole": before, "read": now}))
    assert now < 0.6 * before


def test_damage_is_told_to_all_when_values_are_asked_for(tmp_path: Path) -> None:
    """Also to ranks that keep nothing of the file."""
    source, config = target_of("the same")
    write_source(tmp_path / "source", source, 4)
    file = tmp_path / "source" / "ema" / "shard-00003.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)

    def read(readers: Readers) -> None:
        started(tmp_path / "source", config, cut_flat(config, readers.rank, 4)[: readers.rank], readers)

    for error in Together(4).run(read):
        assert isinstance(error, UserError) and f"{file}: its contents have changed" in str(error)


@pytest.mark.parametrize("readers", [1, 3])
def test_one_reader_compares_a_file_with_what_it_is_said_to_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers: int
) -> None:
    """Which reads all of it; the others are told."""
    dense = network_of(**SOURCES["dense"])
    save_published(PublishedWeights(dense.config, canonical_state(dense)), tmp_path / "bare.pt", bare=True)
    compared: list[str] = []

    def check_objective(*_: Any) -> None:
        compared.append(threading.current_thread().name)
        raise UserError("they are of another")

    monkeypatch.setattr("ditmoe.model.weights.objective.check_objective", check_objective)

    def read(among: Readers) -> None:
        with opened(Start(tmp_path / "bare.pt", None, "ddpm", dense.config, ObjectiveConfig()), among):
            raise AssertionError("it was opened")

    for error in Together(readers).run(read):
        assert isinstance(error, UserError) and str(error) == "they are of another"
    assert compared == ["reader 0"]
