"""The CUDA kernels on a CPU: builds them with g++ against emulator.h, and launches them on CPU memory.

    emulator = Emulator.built()
    params = STRUCTS["ConvParams"](codes=tensor.data_ptr(), ..., N=1, H=8, ...)
    emulator.run("conv_s4_64x64_f16", params, grid=(4, 2, 1), threads=128, shared_bytes=32768)

Pointers are plain addresses of CPU memory (`tensor.data_ptr()`, `array.ctypes.data`), which the caller keeps alive. Any ctypes.Structure of params.h's layout
serves; STRUCTS are read from params.h itself. `run` returns when the kernel has; it raises EmulationError with what a GPU would have done undefined things at.
Several Python threads may run kernels at once.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import pytest

HERE = pathlib.Path(__file__).parent
CUDA = HERE.parents[3] / "engines" / "kernels" / "cuda"
FLAGS = (
    "-std=c++17",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
C_TYPES = {"int": ctypes.c_int, "float": ctypes.c_float}


class EmulationError(RuntimeError):
    """A kernel did what is undefined on a GPU."""


def structs(source: str) -> dict[str, type[ctypes.Structure]]:
    """The structs of a header as ctypes: members are int, float and pointers, several of one type to a line."""
    found = {}
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", source, flags=re.M | re.S):
        fields: list[tuple[str, type]] = []
        for line in re.sub(r"//.*", "", body).split(";"):
            if not line.strip():
                continue
            kind, names = re.fullmatch(r"\s*((?:const )?\w+\*?) (.+?)\s*", line).groups()
            fields += [(one.strip(), ctypes.c_void_p if kind.endswith("*") else C_TYPES[kind]) for one in names.split(",")]
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


STRUCTS = structs((CUDA / "params.h").read_text())


def build(to: pathlib.Path, *flags: str, cuda: pathlib.Path = CUDA) -> pathlib.Path:
    """Compile the kernels in `cuda` into the shared library `to`. Where there is no g++, the test that requires it is skipped."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the emulator is built by g++ on Linux")
    command = ["g++", *FLAGS, *flags, f"-I{HERE}", f"-I{cuda}", str(HERE / "emulator.cpp"), "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    return to


def cached_library(*flags: str) -> pathlib.Path:
    """The build of the present sources with `flags`, made once for their content and kept in the user's cache."""
    digest = hashlib.sha256(" ".join(FLAGS + flags).encode())
    for path in sorted([*CUDA.iterdir(), *HERE.glob("emulator.*")]):
        digest.update(path.name.encode() + path.read_bytes())
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "edm-deploy" / "emulator"
    library = cache / f"{digest.hexdigest()[:24]}.so"
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            os.replace(build(pathlib.Path(scratch) / "emulator.so", *flags), library)
    return library


class Emulator:
    """One build of the kernels."""

    def __init__(self, library: pathlib.Path):
        self._library = ctypes.CDLL(str(library))
        self._library.emulate.restype = ctypes.c_char_p

    @classmethod
    @functools.cache
    def built(cls, *flags: str) -> "Emulator":
        """The emulator of the sources as they are now, compiled with `flags` (default -O1)."""
        return cls(cached_library(*(flags or ("-O1",))))

    def has(self, entry: str) -> bool:
        """Whether an entry point of that name was built."""
        return hasattr(self._library, entry)

    def run(
        self, entry: str, params: ctypes.Structure, grid: tuple[int, int, int] | tuple[int, int], threads: int, shared_bytes: int = 0
    ) -> None:
        """Launch one entry point, and wait for it.

        Raises:
            EmulationError: what it did is undefined on a GPU, or the launch is impossible there.
            AttributeError: no entry point has that name.
        """
        x, y, z = (*grid, 1, 1)[:3]
        address = ctypes.cast(getattr(self._library, entry), ctypes.c_void_p)
        error = self._library.emulate(entry.encode(), address, x, y, z, threads, ctypes.c_size_t(shared_bytes), ctypes.byref(params))
        if error:
            raise EmulationError(f"{entry}: {error.decode()}")
