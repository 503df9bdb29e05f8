"""The machine and the packages a result was made with."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

#: Packages whose version a result may depend on.
PACKAGES = (
    "torch",
    "transformer-lens",
    "numpy",
    "scipy",
    "scikit-learn",
    "hdbscan",
    "safetensors",
    "polca-edit",
)


def versions() -> dict[str, str]:
    """Python and package versions that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class Hardware:
    """The machine a result was made on."""

    processor: str
    cores: int | None
    torch_threads: int
    accelerator: str | None = None


def hardware() -> dict[str, str | int | None]:
    """Processor, cores, threads and accelerator of this machine, as result files have them."""
    return asdict(this_machine())


def this_machine() -> Hardware:
    """Processor, cores, threads and accelerator of this machine."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Hardware(model, os.cpu_count(), torch.get_num_threads(), accelerator)


def _status_bytes(field: str) -> int | None:
    """A size in /proc/self/status, None where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    line = next((n for n in lines if n.startswith(f"{field}:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def resident_bytes() -> int:
    """Resident memory of this process now (its peak where the system tells no more)."""
    found = _status_bytes("VmRSS")
    return peak_rss_bytes() if found is None else found


#: glibc's names of the free size at the end of the heap that goes back to the system, and of the size from
#: which a block is mapped by itself.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: Both where memory is short (the first is glibc's own), and where there is room.
TIGHT, AT_EASE = (1 << 17, 1 << 20), (1 << 26, 1 << 25)


def _glibc(function: str, *arguments: int) -> None:
    """Call the C library's allocator; nothing where it is another one."""
    try:
        getattr(ctypes.CDLL(None), function)(*arguments)
    except (OSError, TypeError, AttributeError):
        return


def give_back_freed_memory() -> None:
    """Have freed blocks of a megabyte and more go back to the system at once, where the C library is glibc.

    Left to itself it raises that size up to 32 MB as blocks are freed. Weights of a layer are smaller, and
    come to lie in a heap whose holes stay the process's.
    """
    for name, size in zip((M_TRIM_THRESHOLD, M_MMAP_THRESHOLD), TIGHT, strict=True):
        _glibc("mallopt", name, size)


def keep_freed_memory() -> None:
    """Have freed blocks of up to 32 MB stay with the process and be used again, where the C library is glibc.

    The system clears every page that it gives out, and products with a Hessian free and ask for gigabytes a
    second: at 70 million parameters a vector takes 1.5 times as long where all goes back at once. What is
    left in holes grows from one checkpoint to the next unless it is given back between them
    (:func:`trim_memory`).
    """
    for name, size in zip((M_TRIM_THRESHOLD, M_MMAP_THRESHOLD), AT_EASE, strict=True):
        _glibc("mallopt", name, size)


def trim_memory() -> None:
    """Give back what is free now, between one kind of work and the next."""
    _glibc("malloc_trim", 0)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    # getrusage would count the peak of the process that started this one.
    found = _status_bytes("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
