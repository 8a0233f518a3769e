"""What weights were trained to predict, as it is said of them, and as our networks predict it."""

from dataclasses import replace

from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.weights.probe import check_objective
from ditmoe.model.weights.published import PublishedWeights
from ditmoe.model.weights.sit import from_sit


def with_objective(
    published: PublishedWeights, said: str | None, key: str, *, trusted: bool = False
) -> PublishedWeights:
    """Weights with their objective; those of SiT turned round, so that t = 1 is noise.

    Args:
        said: ddpm, rectified_flow or sit, as a user says it; None: nobody does.
        key: where it is said, for messages.
        trusted: it is not compared with how the weights answer to noise.

    Raises:
        UserError: the file says another, it is none of the three, or the weights contradict it.
    """
    origin = published.origin
    if published.objective is not None:
        if said not in (None, published.objective.kind):
            raise UserError(
                f"{key}: {said} given, but {origin} says {published.objective.kind}; expected it left out"
            )
        return published
    if said is None:
        return published
    if said not in ("ddpm", "rectified_flow", "sit"):
        raise UserError(f"{key}: {said!r:.60} given, expected ddpm, rectified_flow or sit")
    if not trusted:
        check_objective(published.state(), published.config, said, key, origin)
    if said != "sit":
        return replace(published, objective=ObjectiveConfig.model_validate({"kind": said}))
    ema, weights = (
        None if state is None else from_sit(state, published.config, origin)
        for state in (published.ema, published.weights)
    )
    return replace(published, ema=ema, weights=weights, objective=ObjectiveConfig(kind="rectified_flow"))
