"""The ablation script of the documentation runs as it stands, in at most 25 lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_example_goes_from_checkpoints_to_a_causal_table() -> None:
    script = ROOT / "docs" / "examples" / "ablate.py"
    assert len(script.read_text().splitlines()) <= 25
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, env=environment
    )
    damage, *rows = done.stdout.strip().splitlines()
    assert damage.startswith("{'0:0': ")
    words = {row.split()[0] for row in rows}
    assert {"shared", "inert"} <= words
    assert rows[0].split(maxsplit=1)[1].startswith("Undoing trajectory 0 costs '")
    assert any(row.startswith("A ") and "basis trajectory" in row for row in rows)
