"""What was measured, and on what: commit, versions, hardware; and what the machine can do at best, measured in the
same run: the rate of large matrix products in each precision, and of moving memory."""

import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from ditmoe.launcher.profiling import limits

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("torch", "deepspeed", "numpy")
MATRIX_UNITS: Final = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2")
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Limits:
    """What the machine does at best."""

    products: dict[str, float]
    """FLOP/s of matrix products, by precision."""
    bandwidth: float
    """Bytes per second, read and written together."""

    def seconds(self, precision: str, flops: float, moved: float = 0.0) -> float:
        """The least that some products and some bytes can take, one after the other."""
        return flops / self.products[precision] + moved / self.bandwidth

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def measure_limits(device: torch.device, small: bool = False) -> Limits:
    """Measure them, in seconds."""
    shapes = ((64, 64, 64),) if small else limits.SHAPES[device.type]
    numbers = 2**16 if small else limits.NUMBERS[device.type]
    products = {name: limits.product_rate(device, dtype, shapes) for name, dtype in DTYPES.items()}
    return Limits(products, limits.memory_rate(device, numbers))


def facts(device: torch.device) -> dict[str, Any]:
    """Commit, versions, hardware and load, as plain data."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "cpu": _cpu_lines("model name")[:60],
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "matrix_units": [unit for unit in MATRIX_UNITS if unit in _cpu_lines("flags").split()],
        },
        "load_before": round(os.getloadavg()[0], 2),
        "begun": time.time(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu_lines(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
