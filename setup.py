"""Maps each top-level folder to the subpackage `ditmoe.<folder>`; the rest is in pyproject.toml.

The list is computed, so that a new subpackage cannot be forgotten.
"""

from setuptools import find_namespace_packages, find_packages, setup

CODE_FOLDERS = ("launcher", "model", "parallel", "data", "sampling", "slurm")
RESOURCE_FOLDERS = ("configs",)

packages = []
for folder in CODE_FOLDERS:
    packages += [f"ditmoe.{folder}", *(f"ditmoe.{folder}.{name}" for name in find_packages(folder))]
for folder in RESOURCE_FOLDERS:
    packages += [f"ditmoe.{folder}", *(f"ditmoe.{folder}.{name}" for name in find_namespace_packages(folder))]

setup(
    packages=packages,
    package_dir={f"ditmoe.{folder}": folder for folder in CODE_FOLDERS + RESOURCE_FOLDERS},
)
