"""The package with toys beside its own modules: found first where the folder above this one is on the path."""

from pathlib import Path

_ROOT = Path(__file__).parents[5]
__path__ = [str(_ROOT / ".typing" / "ditmoe"), *__path__]
