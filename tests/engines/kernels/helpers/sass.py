"""What the compiler made of the kernels: instructions, registers, and from these how many blocks share a multiprocessor.

`python -m tests.engines.kernels.helpers.sass` prints the table of docs/kernels.md. NVIDIA's nvdisasm and cuobjdump read our own cubins; no driver is needed.
"""

import dataclasses
import functools
import importlib.metadata
import pathlib
import re
import subprocess
import tempfile

from engines.kernels.attention import launch as attention
from engines.kernels.build import ATTENTION, DOWN, MAIN, ROTATED, SOURCES, cubin
from engines.kernels.launch import BRANCH_BYTES, THREADS, entry_points
from engines.kernels.tiles import TILES


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """What one offers its blocks. Source: CUDA C++ Programming Guide, table of technical specifications per compute capability."""

    shared_bytes: int
    warps: int
    blocks: int
    registers: int = 65536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164 << 10, 64, 32),
    "sm_86": Multiprocessor(100 << 10, 48, 16),
    "sm_89": Multiprocessor(100 << 10, 48, 24),
    "sm_90": Multiprocessor(228 << 10, 64, 32),
}
RESERVED = 1024  # bytes of shared memory that the system keeps for each block
WARP_REGISTERS = 256  # the unit in which a warp's registers are given out


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One entry point as compiled. `stack`: bytes a thread keeps in memory because registers ran out, or because it calls a function."""

    name: str
    registers: int
    stack: int
    fixed_shared: int
    sass: str

    @property
    def spills(self) -> int:
        """Loads and stores of a thread's own memory."""
        return self.count("LDL") + self.count("STL")

    def count(self, instruction: str) -> int:
        """Number of occurrences of an instruction in the code, by the beginning of its name: `IMMA.16864.S4.S4`."""
        return len(re.findall(rf"\b{re.escape(instruction)}", self.sass))

    @property
    def tile(self):
        """The tile of a convolution, else None."""
        return next((tile for tile in TILES if f"_{tile.name}_" in self.name), None)

    @property
    def width(self):
        """The width of attention to all keys, else None."""
        return next((width for width in attention.WIDTHS if self.name.startswith(f"attention_s8_{width.elements}_")), None)

    @property
    def threads(self) -> int:
        shape = self.tile or self.width
        return shape.threads if shape else THREADS

    @property
    def shared_bytes(self) -> int:
        """Shared memory per block, dynamic or static, in bytes."""
        shape = self.tile or self.width
        if self.name.startswith("quantize_branch"):
            return BRANCH_BYTES
        return shape.shared_bytes if shape else self.fixed_shared

    def blocks(self, on: Multiprocessor) -> int:
        """Blocks that fit on one multiprocessor together."""
        warps = self.threads // 32
        a_warp = -(-self.registers * 32 // WARP_REGISTERS) * WARP_REGISTERS
        return min(on.blocks, on.warps // warps, on.registers // a_warp // warps, on.shared_bytes // (self.shared_bytes + RESERVED))


def tool(name: str) -> pathlib.Path:
    """nvdisasm or cuobjdump, from its wheel."""
    files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    return pathlib.Path(str(next(file.locate() for file in files if file.name in (name, f"{name}.exe"))))


@functools.cache
def kernels(arch: str, source: str = MAIN) -> dict[str, Kernel]:
    """The entry points of one source, compiled for `arch`."""
    known = attention.entry_points() if source == ATTENTION else entry_points(source)
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "kernels.cubin"
        path.write_bytes(cubin(arch, main=source).code)

        def output_of(name: str, *options: str) -> str:
            return subprocess.run([tool(name), *options, str(path)], capture_output=True, text=True, check=True).stdout

        usage, listing = output_of("cuobjdump", "-res-usage"), output_of("nvdisasm", "-c")
    parts = re.split(r"^\.text\.(\w+):", listing, flags=re.M)
    sass = dict(zip(parts[1::2], parts[2::2], strict=True))
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:0 ", usage)
    return {
        name: Kernel(name, int(registers), int(stack), int(shared), sass[name]) for name, registers, stack, shared in found if name in known
    }


def rows(arch: str, source: str) -> list[str]:
    """Registers, shared memory and occupancy of one source's float16 kernels (bfloat16's are the same to a few registers), as rows in markdown.

    Of quantizers that rotate or multiply by a branch, those of 4 bits; the others are alike, too.
    """
    on, found, lines = MULTIPROCESSORS[arch], kernels(arch, source), []
    for name in attention.entry_points() if source == ATTENTION else entry_points(source):
        if "_bf16" in name or (source in (ROTATED, DOWN) and "_i8" in name):
            continue
        kernel = found[name]
        blocks = kernel.blocks(on)
        cells = (f"`{name}`", kernel.threads, kernel.registers, kernel.stack, kernel.shared_bytes, blocks, blocks * kernel.threads // 32)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def table(arch: str) -> str:
    """The rows of all sources under their head."""
    head = f"| kernel | threads | registers | spilled bytes | shared bytes | blocks | warps of {MULTIPROCESSORS[arch].warps} |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *(row for source in SOURCES for row in rows(arch, source))])


if __name__ == "__main__":
    print(table("sm_86"))
