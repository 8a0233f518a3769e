"""Training, sampling and evaluating Mixture-of-Experts diffusion transformers.

This folder is the package `ditmoe` itself; the folders beside it are its subpackages (`setup.py`).
"""

from typing import Any

__all__ = ["__version__"]

__version__: str
"""As `pyproject.toml` has it."""


def __getattr__(name: str) -> Any:
    """Look the version up when it is asked for: the command answers at once without it."""
    if name == "__version__":
        from importlib.metadata import version

        return version("ditmoe")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
