"""The machine and the packages a result was made with."""

from __future__ import annotations

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


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    # getrusage would count the peak of the process that started this one.
    found = _status_bytes("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
