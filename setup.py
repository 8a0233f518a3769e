"""Maps each top-level folder to the subpackage `ditmoe.<folder>`, and `package/` to `ditmoe` itself.

The list is computed, so that a new subpackage cannot be forgotten. The rest is in pyproject.toml.
"""

from setuptools import find_namespace_packages, find_packages, setup

CODE_FOLDERS = ("launcher", "model", "parallel", "data", "sampling", "slurm")
RESOURCE_FOLDERS = ("configs", "docs")

packages = ["ditmoe"]
for folder in CODE_FOLDERS:
    packages += [f"ditmoe.{folder}", *(f"ditmoe.{folder}.{name}" for name in find_packages(folder))]
for folder in RESOURCE_FOLDERS:
    packages += [f"ditmoe.{folder}", *(f"ditmoe.{folder}.{name}" for name in find_namespace_packages(folder))]

setup(
    packages=packages,
    package_dir={
        "ditmoe": "package",
        **{f"ditmoe.{folder}": folder for folder in CODE_FOLDERS + RESOURCE_FOLDERS},
    },
)
