"""What a machine must have for torch to compile: looked for before anything is started."""

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from ditmoe.model.errors import UserError


def check_tools(device: str, option: str) -> None:
    """UserError naming all that is missing.

    Args:
        device: the type that the code is for, `cpu` or `cuda`.
        option: what the user wrote, such as `train.compile = true`.
    """
    missing = []
    if device == "cuda":
        if find_spec("triton") is None:
            missing.append("the package triton")
        if not any(shutil.which(name) for name in (os.environ.get("CC") or "gcc", "gcc", "clang")):
            missing.append("a C compiler (gcc, or the one that CC names)")
    else:
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            missing.append(f"the C++ compiler {compiler} (CXX names another)")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        missing.append(f"Python's headers ({header}; Debian's python3-dev)")
    if missing:
        raise UserError(
            f"{option}: this machine lacks {' and '.join(missing)}; expected that here, or no compiling"
        )
