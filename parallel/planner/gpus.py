"""GPUs that are known, from their vendor's data sheets."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, and the usual machine around it."""

    name: str
    model: str
    """A part of the name that the driver gives it."""
    bf16_tflops: float
    """Dense peak, TFLOP/s."""
    fp32_tflops: float
    """Dense peak without TF32, TFLOP/s."""
    memory_gib: float
    memory_bandwidth: float
    """GB/s."""
    bandwidth: float
    """GB/s that one GPU can send to others of its machine, one direction."""
    node_bandwidth: float
    """GB/s that one GPU can send to other machines: its share of the network cards."""
    gpus_per_node: int

    def tflops(self, precision: str) -> float:
        """Dense peak in a precision."""
        return self.bf16_tflops if precision == "bf16" else self.fp32_tflops


GPUS: Final = {
    "h100": Gpu("H100 SXM", "H100", 989, 67, 80, 3350, 450, 50, 8),
    "h200": Gpu("H200 SXM", "H200", 989, 67, 141, 4800, 450, 50, 8),
    "b200": Gpu("B200 SXM", "B200", 2250, 80, 180, 8000, 900, 50, 8),
    "a100-40": Gpu("A100 SXM 40 GB", "A100", 312, 19.5, 40, 1555, 300, 25, 8),
    "a100-80": Gpu("A100 SXM 80 GB", "A100", 312, 19.5, 80, 2039, 300, 25, 8),
    "l40s": Gpu("L40S", "L40S", 362, 91.6, 48, 864, 32, 12.5, 8),
    "rtx4090": Gpu("RTX 4090", "RTX 4090", 165, 82.6, 24, 1008, 16, 3, 8),
}
"""By the name that `--gpu` takes. NVLink where the GPU has it, PCIe otherwise; networks of 400, 200, 100 and 25
Gb/s per GPU are what such machines usually have, and should be given where they differ."""


def tflops_of_device(name: str, precision: str) -> float | None:
    """Dense peak of the GPU that the driver calls so, TFLOP/s; None where it is not known."""
    return next((gpu.tflops(precision) for gpu in GPUS.values() if gpu.model in name), None)
