"""Training, sampling and evaluating Mixture-of-Experts diffusion transformers.

    import ditmoe
    model = ditmoe.load("runs/photos")
    images = model.sample(classes=["cat"], seed=0)

This folder is the package `ditmoe` itself; the folders beside it are its subpackages (`setup.py`). Names are
imported when they are used: `import ditmoe` loads no torch.
"""

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from ditmoe.model.errors import UserError
    from ditmoe.sampling.python.model import Model, grid, load

__all__ = ["Model", "UserError", "__version__", "grid", "load"]

__version__: str
"""As `pyproject.toml` has it."""

_PLACES: Final = {
    "Model": "ditmoe.sampling.python.model",
    "UserError": "ditmoe.model.errors",
    "grid": "ditmoe.sampling.python.model",
    "load": "ditmoe.sampling.python.model",
}
"""Name → the module that has it."""


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("ditmoe")
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What there is, imported or not."""
    return sorted({*globals(), *__all__})
