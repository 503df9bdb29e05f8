"""Device paths on a device that refuses CPU tensors (``tests/device_checks.py``), in a process of its own.

The backward engine counts its devices when it is first used, so a device registered later has no queue.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).with_name("device_checks.py")


def test_the_device_paths_put_nothing_on_the_cpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=CHECKS.parent.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
