"""Devices that a plan can be made for without having them: what their makers' data sheets say.

Dense matrix rates, without sparsity, in the 16-bit type named; bytes are of the device's memory.
Nothing here was measured, and no device reaches its data sheet: a plan takes REACHED of the rate.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamaweft.errors import UserError

REACHED = 0.5
"""Share of a data sheet's matrix rate that products are planned at. An assumption."""

RESERVED_BYTES = 2**30
"""Memory that the driver and its libraries keep. An assumption."""


@dataclass(frozen=True)
class Device:
    """memory_bytes; flops: FLOPs a second in `dtype`; bandwidth: bytes a second."""

    name: str
    memory_bytes: int
    flops: float
    bandwidth: float
    dtype: str = "bf16"

    @property
    def usable_bytes(self) -> int:
        return self.memory_bytes - RESERVED_BYTES


def _device(name: str, gigabytes: int, tflops: float, gb_s: float, dtype: str = "bf16") -> Device:
    return Device(name, gigabytes * 10**9, tflops * 1e12, gb_s * 1e9, dtype)


# NVIDIA's data sheets of each product; A100 and H100 are the SXM modules.
DEVICES = {
    "h200": _device("NVIDIA H200", 141, 989, 4800),
    "h100": _device("NVIDIA H100", 80, 989, 3350),
    "a100": _device("NVIDIA A100 80GB", 80, 312, 2039),
    "a100-40gb": _device("NVIDIA A100 40GB", 40, 312, 1555),
    "l40s": _device("NVIDIA L40S", 48, 362, 864),
    "l4": _device("NVIDIA L4", 24, 121, 300),
    "rtx4090": _device("NVIDIA GeForce RTX 4090", 24, 165, 1008),
    "rtx3090": _device("NVIDIA GeForce RTX 3090", 24, 71, 936),
    "v100": _device("NVIDIA V100", 16, 125, 900, "fp16"),
    "t4": _device("NVIDIA T4", 16, 65, 300, "fp16"),
}


def find_device(name: str) -> Device:
    """Raises UserError, with the names there are, for an unknown one."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise UserError(f"--device {name}: unknown; known are {', '.join(DEVICES)}")
    return found
