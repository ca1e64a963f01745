"""What is known of the devices that models run on."""

from typing import Any

# Peak dense bf16 FLOP/s of one device as JAX counts devices. Sources: the vendors' data sheets (Google Cloud TPU
# documentation; NVIDIA H100/H200/A100 data sheets, without sparsity).
PEAK_FLOPS: dict[str, float] = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_flops(device: Any) -> float | None:
  """Peak bf16 FLOP/s of a device; None where it is not in the table (a guess would make any utilisation up)."""
  return PEAK_FLOPS.get(device.device_kind)
