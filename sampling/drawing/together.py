"""Images that the ranks of a group draw together: each draws whole batches, with its part of the experts.

Shapes: N images.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ditmoe.parallel.expert_group import NetworkOfGroup
from ditmoe.sampling.chains.images import ChainImages, StateFile
from ditmoe.sampling.chains.state import chains_of_seeds
from ditmoe.sampling.drawing.generate import Generated, default_labels, generate
from ditmoe.sampling.network.load import LoadedModel
from ditmoe.sampling.noise_level.levels import NoisePosterior
from ditmoe.sampling.settings.config import SamplerConfig


def generate_together(
    model: LoadedModel,
    labels: Tensor | None,
    image_numbers: Sequence[int],
    config: SamplerConfig,
    batch: int,
    progress: Callable[[int], None] | None = None,
    *,
    posterior: NoisePosterior | None = None,
    state_file: StateFile | None = None,
    seeds: Sequence[int] | None = None,
    frames: int | None = None,
    on_evaluation: Callable[[int], None] | None = None,
) -> Generated:
    """As `generate`, by all ranks of a group, which call it with the same arguments.

    The batches are those of one process; they are dealt to the ranks in turn.

    Returns:
        All the images, on each rank.
    """
    network = model.network
    assert isinstance(network, NetworkOfGroup) and model.model_config.num_classes is not None
    group, images_per_unit = network.group, config.images_per_unit
    if labels is None:
        labels = default_labels(image_numbers, model.model_config.num_classes, images_per_unit)
    dealt = image_numbers
    if seeds is not None and config.chains:
        dealt, _ = chains_of_seeds(seeds, image_numbers, labels.tolist(), images_per_unit)
    rows = dealt_rows(dealt, images_per_unit, batch, group.rank, group.size)
    if state_file is not None:
        path = state_file.path
        name = f"{path.stem}-{group.rank}-of-{group.size}{path.suffix}"
        state_file = replace(state_file, path=path.with_name(name))
    drawn = None
    if rows:
        numbers = [image_numbers[row] for row in rows]
        drawn = generate(
            model,
            labels[rows],
            numbers,
            config,
            batch,
            progress,
            posterior=posterior,
            state_file=state_file,
            seeds=None if seeds is None else [seeds[row] for row in rows],
            frames=frames,
            on_evaluation=on_evaluation,
        )
    network.finish()
    parts = [part for part in group.gather(None if drawn is None else (rows, drawn)) if part is not None]
    return _joined(parts)


def dealt_rows(image_numbers: Sequence[int], images_per_unit: int, batch: int, rank: int, ranks: int) -> list[int]:
    """Places among the images of those that a rank draws: every `ranks`-th batch of images, or of chains."""
    units = sorted({number // images_per_unit for number in image_numbers}) if images_per_unit > 1 else None
    if units is None:
        return [row for row in range(len(image_numbers)) if row // batch % ranks == rank]
    own = {unit for place, unit in enumerate(units) if place // batch % ranks == rank}
    return [row for row, number in enumerate(image_numbers) if number // images_per_unit in own]


def _joined(parts: Sequence[tuple[list[int], Generated]]) -> Generated:
    """All images in the order that was asked for."""
    order = torch.cat([torch.tensor(rows) for rows, _ in parts]).argsort()
    drawn = [each for _, each in parts]

    def join(tensors: Sequence[Tensor | None]) -> Tensor:
        return torch.cat([tensor for tensor in tensors if tensor is not None])[order]

    chains = None
    if drawn[0].chains is not None:
        fields = zip(*(each.chains for each in drawn if each.chains is not None), strict=True)
        chains = ChainImages(*map(join, fields))
    finite_N = None if drawn[0].finite_N is None else join([each.finite_N for each in drawn])
    frames_NFHWC = None if drawn[0].frames_NFHWC is None else join([each.frames_NFHWC for each in drawn])
    return Generated(
        join([each.image_NHWC for each in drawn]),
        join([each.nfe_N for each in drawn]),
        drawn[0].passes_per_evaluation,
        chains,
        finite_N,
        frames_NFHWC,
        drawn[0].cached_per_evaluation,
    )
