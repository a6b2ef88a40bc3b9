"""Devices that a plan can be made for without having them: what their makers' data sheets say.

Dense matrix rates, without sparsity, in the 16-bit type named; bytes are of the device's memory.
Links are counted in one direction. Nothing here was measured, and no device reaches its data sheet:
a plan takes REACHED of the rate of products and LINK_REACHED of that of links.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llamaweft.errors import UserError

REACHED = 0.5
"""Share of a data sheet's matrix rate that products are planned at. An assumption."""

RESERVED_BYTES = 2**30
"""Memory that the driver and its libraries keep. An assumption."""

LINK_REACHED = 0.7
"""Share of a link's data sheet rate that a collective is planned at. An assumption."""

CALL_SECONDS = 30e-6
"""What a collective takes beside moving its bytes. An assumption."""


@dataclass(frozen=True)
class Device:
    """memory_bytes; flops: FLOPs a second in `dtype`; bandwidth: bytes a second of its memory.

    link, host: bytes a second, one way, to another device of its machine and to the host's memory.
    link_name: what that link is. network_gbit: Gbit a second to other machines, its share of its
    machine's.
    """

    name: str
    memory_bytes: int
    flops: float
    bandwidth: float
    link_name: str
    link: float
    host: float
    network_gbit: float
    dtype: str = "bf16"

    @property
    def usable_bytes(self) -> int:
        return self.memory_bytes - RESERVED_BYTES


def _device(
    name: str,
    gigabytes: int,
    tflops: float,
    gb_s: float,
    link: tuple[str, float],
    host_gb_s: float,
    network_gbit: float = 25,
    dtype: str = "bf16",
) -> Device:
    rates = (link[1] * 1e9, host_gb_s * 1e9, network_gbit)
    return Device(name, gigabytes * 10**9, tflops * 1e12, gb_s * 1e9, link[0], *rates, dtype)


PCIE_3, PCIE_4 = ("PCIe 3 x16", 16), ("PCIe 4 x16", 32)

# NVIDIA's data sheets of each product; A100, H100, H200 and V100 are the SXM modules, whose NVLink
# is given there both ways together: 300, 600 and 900 GB/s. The network of H100 and H200 is that of
# NVIDIA's DGX H100 (eight ports of 400 Gbit/s), of A100 that of DGX A100 (eight of 200); the 25
# Gbit/s of the others are an assumption.
DEVICES = {
    "h200": _device("NVIDIA H200", 141, 989, 4800, ("NVLink 4", 450), 64, 400),
    "h100": _device("NVIDIA H100", 80, 989, 3350, ("NVLink 4", 450), 64, 400),
    "a100": _device("NVIDIA A100 80GB", 80, 312, 2039, ("NVLink 3", 300), 32, 200),
    "a100-40gb": _device("NVIDIA A100 40GB", 40, 312, 1555, ("NVLink 3", 300), 32, 200),
    "l40s": _device("NVIDIA L40S", 48, 362, 864, PCIE_4, 32),
    "l4": _device("NVIDIA L4", 24, 121, 300, PCIE_4, 32),
    "rtx4090": _device("NVIDIA GeForce RTX 4090", 24, 165, 1008, PCIE_4, 32),
    "rtx3090": _device("NVIDIA GeForce RTX 3090", 24, 71, 936, PCIE_4, 32),
    "v100": _device("NVIDIA V100", 16, 125, 900, ("NVLink 2", 150), 16, dtype="fp16"),
    "t4": _device("NVIDIA T4", 16, 65, 300, PCIE_3, 16, dtype="fp16"),
}


@dataclass(frozen=True)
class Machines:
    """Devices of one kind, evenly in `nodes` machines.

    node_gbit: Gbit a second of a machine's network, one way; None: its devices' own.
    """

    device: Device
    count: int = 1
    nodes: int = 1
    node_gbit: float | None = None

    @property
    def per_node(self) -> int:
        return self.count // self.nodes

    @property
    def network_gbit(self) -> float:
        """Of a machine."""
        return self.node_gbit or self.per_node * self.device.network_gbit

    def bandwidth(self, stride: int, ranks: int) -> float:
        """Bytes a second, one way, that each rank of a ring over `ranks` ranks has, `stride` apart,
        while every other ring of its kind is busy too.

        Within a machine that of the device's link. A ring that leaves it has as much of the
        machine's network as it has devices there, and no more than the link.
        """
        if stride * ranks <= self.per_node:
            return self.device.link
        members = max(1, self.per_node // stride)
        network = self.network_gbit * 1e9 / 8
        return min(self.device.link, network * members / self.per_node)

    def __str__(self) -> str:
        return f"{self.count} x {self.device.name}" + f" in {self.nodes} machines" * (
            self.nodes > 1
        )


def find_device(name: str) -> Device:
    """Raises UserError, with the names there are, for an unknown one."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise UserError(f"--device {name}: unknown; known are {', '.join(DEVICES)}")
    return found


def device_called(reported: str) -> Device | None:
    """The device that a driver calls so, such as `NVIDIA A100-SXM4-80GB`; None where it is none of
    those above. Cards of the same chip without its NVLink are not."""
    words = set(re.split(r"[ -]", reported.lower()))
    for device in DEVICES.values():
        links = device.link_name.startswith("NVLink")
        if links and words & {"pcie", "nvl"}:
            continue
        if words >= set(device.name.lower().split()) - {"nvidia"}:
            return device
    return None


def find_machines(devices: str, nodes: int = 1, node_gbit: float | None = None) -> Machines:
    """Machines by what a user calls them: `64xh100`, or `h100` for one.

    Raises UserError for what is no number of known devices, and for devices that do not fill so
    many machines evenly.
    """
    found = re.fullmatch(r"(?:(\d{1,6})x)?([a-z][a-z0-9-]*)", devices.strip().lower())
    if found is None or found[1] == "0":
        raise UserError(f"--devices {devices}: give a number and a device, such as 64xh100")
    if found[2] == "cpu":
        raise UserError(
            f"--devices {devices}: no data sheet says how fast a CPU is; leave it out, and "
            "this machine is measured"
        )
    if found[2] not in DEVICES:
        raise UserError(
            f"--devices {devices}: {found[2]} is unknown; known are {', '.join(DEVICES)}"
        )
    count = int(found[1] or 1)
    if count % nodes:
        raise UserError(
            f"--nodes {nodes}: {count} devices do not fill {nodes} machines evenly; give a number "
            f"that divides {count}"
        )
    return Machines(DEVICES[found[2]], count, nodes, node_gbit)
