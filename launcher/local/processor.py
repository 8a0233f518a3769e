"""Whether this machine's processor multiplies matrices in bfloat16, and which number type a run gains by."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal, NamedTuple

from ditmoe.model.errors import UserError

CPUINFO: Final = Path("/proc/cpuinfo")
BF16_UNITS: Final = ("amx_bf16", "avx512_bf16", "bf16")
"""Intel's AMX, AVX512-BF16 of Intel and AMD, and Arm's."""
NARROWEST_IN_BF16: Final = 96
"""Width from which on bf16 is faster on a CPU that has instructions for it (docs/performance.md)."""


class Choice(NamedTuple):
    """What `train.precision: auto` stands for."""

    precision: Literal["fp32", "bf16"]
    reason: str
    """After "for": a clause."""


def choose_precision(device: str, hidden: int, zero: int) -> Choice:
    """The faster number type of a run that starts on this machine, among those that compute correctly.

    Args:
        device: its type, `cpu` or `cuda`.
        hidden: width of the network.
        zero: stage of ZeRO.
    """
    if zero == 0:
        return Choice("fp32", "with parallel.zero = 0 bf16 does not compute correctly")
    if device != "cpu":
        return Choice("bf16", "a GPU multiplies it fastest")
    units = bf16_units()
    if units is None:
        return Choice("fp32", f"this processor has no instructions for bf16 (none of {', '.join(BF16_UNITS)})")
    if units == "unknown":
        return Choice("fp32", f"{CPUINFO} does not say whether this processor has instructions for bf16")
    if hidden < NARROWEST_IN_BF16:
        return Choice(
            "fp32", f"a network of model.hidden = {hidden} gains nothing by bf16, one of {NARROWEST_IN_BF16} does"
        )
    return Choice("bf16", f"this processor has {units}, and the network is {hidden} wide")


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
            " train.precision = fp32 for a new run, for one that began in bf16 another processor, or"
            " train.emulated_bf16 = true to compute in bf16 all the same"
        )
