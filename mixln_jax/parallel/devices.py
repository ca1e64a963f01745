"""Peak rates and memory sizes of the devices that models run on."""

from typing import Any, NamedTuple

GIB = 2**30


class Device(NamedTuple):
  """The capabilities of one device, as JAX counts devices.

  Attributes:
    peak_flops: dense bf16 FLOP/s, without sparsity.
    memory_bytes: the memory that a program can use.
    memory_bandwidth: bytes/s between the memory and the cores.
    network_bandwidth: bytes/s that it can send to other devices of its slice or host, over all links in one direction.
    clock: cycles/s of a TPU's cores; None for other devices.
  """

  peak_flops: float
  memory_bytes: int
  memory_bandwidth: float
  network_bandwidth: float
  clock: float | None = None


# By `device_kind`. Sources: the Google Cloud TPU documentation of v4, v5e, v5p and v6e (for the last three it gives the
# inter-chip bandwidth as the sum of both directions; that of v4 is from arXiv 2304.01433: 6 links of 50 GB/s), and
# NVIDIA's data sheets of A100, H100 SXM and H200 SXM (NVLink: the sum of both directions). The memory of TPUs is what
# libtpu 0.0.42's compiler reports as available to a program; that of GPUs is from the data sheet (JAX takes three
# quarters of it by default). Clocks are the peak divided by two FLOPs for each multiplier of the matrix units: 8 × 128²
# per chip for v4 and v5p, 4 × 128² for v5e, 4 × 256² for v6e (same pages).
DEVICES: dict[str, Device] = {
  "TPU v4": Device(275e12, int(30.75 * GIB), 1200e9, 300e9, 1.05e9),
  "TPU v5 lite": Device(197e12, int(15.75 * GIB), 819e9, 200e9, 1.5e9),
  "TPU v5": Device(459e12, int(95.74 * GIB), 2765e9, 600e9, 1.75e9),
  "TPU v6 lite": Device(918e12, int(31.25 * GIB), 1638e9, 400e9, 1.75e9),
  "NVIDIA A100-SXM4-40GB": Device(312e12, 40 * 10**9, 1555e9, 300e9),
  "NVIDIA A100-SXM4-80GB": Device(312e12, 80 * 10**9, 2039e9, 300e9),
  "NVIDIA H100 80GB HBM3": Device(989e12, 80 * 10**9, 3350e9, 450e9),
  "NVIDIA H200": Device(989e12, 141 * 10**9, 4800e9, 450e9),
}


def peak_flops(device: Any) -> float | None:
  """Peak bf16 FLOP/s of a device; None if it is not in the table, since a guess would make any utilisation wrong."""
  known = DEVICES.get(device.device_kind)
  return None if known is None else known.peak_flops
