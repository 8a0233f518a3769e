"""The DiT-MoE network, its objectives, EMA and published weights: plain PyTorch, no processes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditmoe.model.weights.published import load_published as load_published
    from ditmoe.model.weights.published import save_published as save_published


def __getattr__(name: str) -> Any:
    """`load_published` and `save_published`, imported when asked for: the configuration needs no torch."""
    if name in ("load_published", "save_published"):
        from ditmoe.model.weights import published

        return getattr(published, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
