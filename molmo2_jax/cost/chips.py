"""TPU chips, their slices, and the cloud's names of these. Standard library only.

Here a slice is named by chip and topology: "v5p:4x4x8" has 128 chips. Cloud names of v4 and v5p count
TensorCores, two per chip, so the same slice is "v5p-256" there; the names of TPU7x in GKE's tools do too;
those of v5e and v6e count chips. Run as a script, `chips.py v5p-256` prints chip, topology, chips, hosts,
chips per host, GKE's name and the cloud's name of the slice.

Source: the cloud's pages "TPU v5p", "TPU v6e", "TPU7x (Ironwood)" and so on, November 2026.
"""

import dataclasses
import math
import re
import sys

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of TPU. Rates and memory are per JAX device, which is a chip (TPU7x: half a chip): bfloat16
    FLOP/s; bytes/s of memory, of all ICI links in one direction, and of its share of the host's network."""
    name: str
    flops: float
    memory: int             # bytes that a program may use, according to the compiler
    memory_rate: float
    ici_rate: float
    dcn_rate: float
    dimensions: int         # of the torus
    chips_per_host: int
    cloud_prefix: str       # of accelerator types; "" if the cloud has none
    cores_per_chip: int     # counted per chip by the number in the cloud's name
    devices_per_chip: int = 1
    gke: str
    kinds: tuple[str, ...]  # jax.Device.device_kind
    matrix_side: int        # rows and columns of a matrix unit
    compiler_options: tuple[tuple[str, bool], ...] = ()   # of every train step

    @property
    def link_rate(self) -> float:
        """Bytes/s of one link of a chip in one direction."""
        return self.ici_rate * self.devices_per_chip / (2 * self.dimensions)


CHIPS = {chip.name: chip for chip in (
    Chip(name="v4", flops=275e12, memory=int(31.75 * GIB), memory_rate=1.2e12, ici_rate=3.0e11,
         dcn_rate=6.25e9, dimensions=3, chips_per_host=4, cloud_prefix="v4-", cores_per_chip=2,
         gke="tpu-v4-podslice", kinds=("TPU v4",), matrix_side=128),
    Chip(name="v5e", flops=197e12, memory=int(15.75 * GIB), memory_rate=8.19e11, ici_rate=2.0e11,
         dcn_rate=6.25e9, dimensions=2, chips_per_host=4, cloud_prefix="v5litepod-",
         cores_per_chip=1, gke="tpu-v5-lite-podslice", kinds=("TPU v5 lite", "TPU v5e"), matrix_side=128),
    Chip(name="v5p", flops=459e12, memory=int(95.74 * GIB), memory_rate=2.765e12, ici_rate=6.0e11,
         dcn_rate=6.25e9, dimensions=3, chips_per_host=4, cloud_prefix="v5p-", cores_per_chip=2,
         gke="tpu-v5p-slice", kinds=("TPU v5", "TPU v5p"), matrix_side=128),
    Chip(name="v6e", flops=918e12, memory=int(31.25 * GIB), memory_rate=1.64e12, ici_rate=4.48e11,
         dcn_rate=1.25e10, dimensions=2, chips_per_host=4, cloud_prefix="v6e-", cores_per_chip=1,
         gke="tpu-v6e-slice", kinds=("TPU v6 lite", "TPU v6e"), matrix_side=256),
    Chip(name="tpu7x", flops=1153.5e12, memory=int(94.75 * GIB), memory_rate=3.69e12, ici_rate=3.0e11,
         dcn_rate=6.25e9, dimensions=3, chips_per_host=4, cloud_prefix="tpu7x-", cores_per_chip=2,
         devices_per_chip=2, gke="tpu7x", kinds=("TPU7x",), matrix_side=256,
         # libtpu 0.0.42.1 aborts where it gives sums of a small TPU7x slice to the SparseCores.
         compiler_options=(("xla_tpu_enable_sparse_core_collective_offload_all_reduce", False),)),
)}

_SIDES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Slices of 64 and more chips consist of 4x4x4 cubes; per number of chips, the shape of the cloud's name.
_SIDES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x4x20", "4x8x12",
             "4x4x28", "8x8x8", "4x12x12", "4x8x20", "8x8x12", "4x8x28", "4x12x20", "8x8x16", "8x12x12",
             "8x8x20", "8x12x16", "12x12x12", "8x8x28", "8x12x20", "8x16x16", "12x12x16", "12x16x16",
             "16x16x16", "16x16x24")
TOPOLOGIES = {2: _SIDES_2D, 3: _SIDES_3D}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice: `sides` of its torus in chips."""
    chip: Chip
    sides: tuple[int, ...]

    @property
    def topology(self) -> str:
        return "x".join(map(str, self.sides))

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.topology}"

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        """Number of machines; a slice of v5e or v6e with up to 8 chips is one machine."""
        if self.chip.dimensions == 2 and self.chips <= 8:
            return 1
        return max(1, self.chips // self.chip.chips_per_host)

    @property
    def cloud_name(self) -> str:
        return f"{self.chip.cloud_prefix}{self.chips * self.chip.cores_per_chip}"


def known() -> list[Slice]:
    """Returns all slices that have a name in the cloud."""
    return [Slice(chip, tuple(map(int, sides.split("x"))))
            for chip in CHIPS.values() for sides in TOPOLOGIES[chip.dimensions]]


def find(name: str) -> Slice:
    """Returns the slice called `name`, here ("v5p:4x4x8") or in the cloud ("v5p-256").

    Raises:
      ValueError: there is none; the message lists the chip's slices, or else the chips, with both names.
    """
    slices = known()
    for one in slices:
        if name in (one.name, one.cloud_name):
            return one
    of_chip = [one for one in slices
               if re.match(rf"({one.chip.name}|{one.chip.cloud_prefix[:-1]})(\W|$)", name)]
    offered = [f"{one.name} ({one.cloud_name}, {one.chips} chips)" for one in of_chip] or [
        f"{chip.name}:SIDES ({chip.cloud_prefix}NUMBER)" for chip in CHIPS.values()]
    raise ValueError(f"a TPU slice must be one of {', '.join(offered)}; got {name!r}")


def of_device(kind: str) -> Chip | None:
    """Returns the chip that JAX calls `kind`; None for other devices."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)


if __name__ == "__main__":
    try:
        found = find(sys.argv[1])
    except ValueError as wrong:
        sys.exit(f"error: {wrong}")
    print(found.chip.name, found.topology, found.chips, found.hosts, found.chips // found.hosts,
          found.chip.gke, found.cloud_name)
