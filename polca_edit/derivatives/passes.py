"""Count of the work done, in passes over tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PassCount:
    """Work done, in passes over tokens: one unit is one sequence through the model once.

    ``weighted(S)`` divides by a token-set size to give passes over that set.
    """

    forward: float = 0.0
    backward: float = 0.0
    tangent: float = 0.0
    hvp: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """Counts by kind, in sequences."""
        return {"forward": self.forward, "backward": self.backward, "tangent": self.tangent, "hvp": self.hvp}
