"""GPUs that are known, from their vendor's data sheets; a CPU core; and those that somebody describes."""

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
    tf32_tflops: float | None = None
    """Dense peak with TF32, TFLOP/s; None: that of fp32."""

    @property
    def is_cpu(self) -> bool:
        """Whether it is a core of a CPU, on which a run without GPUs has a process each."""
        return self is CPU_CORE or self.name == CPU_CORE.name

    @property
    def unit(self) -> str:
        """What one of them is called where they are counted."""
        return "CPU core" if self.is_cpu else "GPU"

    def tflops(self, precision: str) -> float:
        """Dense peak in a precision: `bf16`, `fp32` or `tf32`."""
        if precision == "tf32":
            return self.tf32_tflops or self.fp32_tflops
        return self.bf16_tflops if precision == "bf16" else self.fp32_tflops


GPUS: Final = {
    "h100": Gpu("H100 SXM", "H100", 989, 67, 80, 3350, 450, 50, 8, 495),
    "h200": Gpu("H200 SXM", "H200", 989, 67, 141, 4800, 450, 50, 8, 495),
    "b200": Gpu("B200 SXM", "B200", 2250, 80, 180, 8000, 900, 50, 8, 1100),
    "a100-40": Gpu("A100 SXM 40 GB", "A100", 312, 19.5, 40, 1555, 300, 25, 8, 156),
    "a100-80": Gpu("A100 SXM 80 GB", "A100", 312, 19.5, 80, 2039, 300, 25, 8, 156),
    "l40s": Gpu("L40S", "L40S", 362, 91.6, 48, 864, 32, 12.5, 8, 183),
    "rtx4090": Gpu("RTX 4090", "RTX 4090", 165, 82.6, 24, 1008, 16, 3, 8),
}
"""By the name that `--gpu` takes. NVLink where the GPU has it, PCIe otherwise; networks of 400, 200, 100 and 25
Gb/s per GPU are what such machines usually have, and should be given where they differ."""

CPU_CORE: Final = Gpu("CPU core", "", 0.19, 0.19, 2, 10, 5, 1, 64)
"""A core with AVX-512 and its share of a laptop's memory; a run without GPUs has a process on each."""

PCIE_BANDWIDTH: Final = 32.0
"""GB/s to others of a machine where nobody says otherwise: PCIe 4."""
NETWORK_BANDWIDTH: Final = 12.5
"""GB/s to other machines where nobody says otherwise: 100 Gb/s."""
BYTES_PER_FLOP: Final = 4e-3
"""Memory bandwidth where nobody says otherwise, as a share of the peak; the known ones have 0.0024 to 0.0065."""


def described_gpu(peak_tflops: float, memory_gib: float) -> Gpu:
    """A GPU of which no more is known than its peak, TFLOP/s in the run's precision, and its memory."""
    return Gpu(
        f"GPU of {peak_tflops:g} TFLOP/s",
        "",
        peak_tflops,
        peak_tflops,
        memory_gib,
        peak_tflops * 1e3 * BYTES_PER_FLOP,
        PCIE_BANDWIDTH,
        NETWORK_BANDWIDTH,
        8,
    )


def tflops_of_device(name: str, precision: str) -> float | None:
    """Dense peak of the GPU that the driver calls so, TFLOP/s; None where it is not known."""
    return next((gpu.tflops(precision) for gpu in GPUS.values() if gpu.model in name), None)
