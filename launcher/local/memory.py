"""Memory that a step of training frees stays with the process, on a CPU.

The C library gives large blocks back to the system at once, and each step of training takes them again: gradients,
and DeepSpeed's flat copies of them. The system then makes every page anew and fills it with zeros, in the middle
of the step. That took up to a third of a step's time (docs/performance.md).

Where experts' rows, and so the sizes of blocks, are others in every step, a process grows by some KB a step for
thousands of steps, with memory kept or given back alike, and then no more (`benchmarks/kept_memory.py`,
docs/performance.md).
"""

import ctypes
import sys
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_MAX: Final = -4


def keep_freed_memory() -> bool:
    """Keep what is freed from now on, for what is allocated next; whether the C library can (glibc).

    What it is worth is in steps that repeat. A process whose memory shall shrink must not call it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    # No block from a mapping of its own, and nothing off the end of the heap (−1 is the largest number there).
    return all(mallopt(parameter, value) == 1 for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))
