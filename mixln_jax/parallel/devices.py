"""What is known of the devices that models run on."""

from typing import Any, NamedTuple

GIB = 2**30


class Device(NamedTuple):
  """What one device, as JAX counts devices, can do.

  Attributes:
    peak_flops: dense bf16 FLOP/s, without sparsity.
    memory_bytes: what a program may use of its memory.
    memory_bandwidth: bytes/s between the memory and the cores.
    network_bandwidth: bytes/s that it sends to the others of its slice or box, over all its links, in one direction.
    clock: cycles/s of a TPU's cores; None where nothing counts cycles.
  """

  peak_flops: float
  memory_bytes: int
  memory_bandwidth: float
  network_bandwidth: float
  clock: float | None = None


# By `device_kind`. Sources: Google Cloud TPU documentation, the pages of v4, v5e, v5p and v6e (they give the inter-chip
# bandwidth of the last three as the sum of both directions; that of v4 is from arXiv 2304.01433: 6 links of 50 GB/s);
# NVIDIA's A100, H100 SXM and H200 SXM data sheets (NVLink: the sum of both directions). Memory of TPUs: what is left of
# it for a program, as libtpu 0.0.42's compiler says when one is too large; of GPUs: the data sheet's, of which JAX
# takes three quarters unless it is told otherwise. Clocks: the peak over two FLOPs for each multiplier of the matrix
# units, of which a chip of v4 and v5p has 8 × 128², of v5e 4 × 128², of v6e 4 × 256² (the same pages).
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
  """Peak bf16 FLOP/s of a device; None where it is not in the table (a guess would make up any utilisation)."""
  known = DEVICES.get(device.device_kind)
  return None if known is None else known.peak_flops
