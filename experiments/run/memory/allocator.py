"""What the C library does with freed memory: kept for the next use, or given back to the system."""

from __future__ import annotations

import ctypes

from experiments.config import RunConfig

#: Vectors that a budget holds at least where freed memory may stay with the process: its holes take about
#: five and as much as a batch under way (measured at 70 million parameters).
ROOMY_VECTORS = 32
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


def settle_allocator(config: RunConfig, parameters: int) -> None:
    """Freed memory stays with the process where a budget leaves room for holes or there is none.

    Elsewhere it goes back to the system at once.
    """
    roomy = ROOMY_VECTORS * config.itemsize * parameters
    if config.memory_gb is None or config.memory_gb * 1e9 >= roomy:
        keep_freed_memory()
    else:
        give_back_freed_memory()
