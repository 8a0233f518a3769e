"""Whether this machine's processor multiplies matrices in bfloat16."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ditmoe.model.errors import UserError

CPUINFO: Final = Path("/proc/cpuinfo")
BF16_UNITS: Final = ("amx_bf16", "avx512_bf16", "bf16")
"""Intel's AMX, AVX512-BF16 of Intel and AMD, and Arm's."""


def bf16_units() -> str | None:
    """The first of `BF16_UNITS` that the processor has; `unknown` where the system does not say; None: none."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    return _units_of(lines)


def _units_of(cpuinfo: Iterable[str]) -> str | None:
    for line in cpuinfo:
        key, _, flags = line.partition(":")
        if key.strip() in ("flags", "Features"):
            found = set(flags.split())
            return next((unit for unit in BF16_UNITS if unit in found), None)
    return "unknown"


def check_bf16(precision: str, emulated: bool) -> None:
    """UserError where a CPU shall compute in bf16 that has no instructions for it, unless that is insisted on."""
    if precision == "bf16" and not emulated and bf16_units() is None:
        raise UserError(
            "train.precision = bf16: this processor has no instructions for it (none of"
            f" {', '.join(BF16_UNITS)} in {CPUINFO}), and would take 44 to 500 times as long as in fp32; expected"
            " train.precision = fp32, or train.emulated_bf16 = true to compute in bf16 all the same"
        )
