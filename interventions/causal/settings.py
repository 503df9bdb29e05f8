"""Every threshold and number of draws of the causal test, with its default."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TestSettings:
    """How much is drawn, and where answers change.

    Attributes:
        resamples: bootstrap resamples of documents.
        null_documents: documents on which random and rotated edits are measured; effects use all.
        random_draws: random edits of equal norm, placement and spectrum per movement (N).
        rotations: rotations of a basis's span (S, P); each gives K directions.
        observed_rotations: rotations whose axes are observed and clustered anew (A).
        transplants: transplants of equal size in the span per movement (L); 0 leaves L out.
        level: of the tests.
        damage_floor: least damage that counts as need, nats per token.
        leakage: largest share of the target's loss that any other group may have (S).
        within: share by which a group must lose more than the rest of its parent (W).
        carries: share of headroom that the movement must bring when inserted alone (L).
        carries_not: share below which it does not (L).
        headroom_floor: groups with less headroom are judged in nats, nats per token.
        least: tokens a group must have on the split.
        seed: of every draw.
    """

    __test__ = False  # pytest collects classes named Test...

    resamples: int = 1000
    null_documents: int = 64
    random_draws: int = 39
    rotations: int = 39
    observed_rotations: int = 19
    transplants: int = 19
    level: float = 0.05
    damage_floor: float = 0.02
    leakage: float = 1 / 3
    within: float = 0.1
    carries: float = 0.2
    carries_not: float = 0.1
    headroom_floor: float = 0.05
    least: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "resamples": (self.resamples, 100),
            "null_documents": (self.null_documents, 2),
            "random_draws": (self.random_draws, 19),
            "rotations": (self.rotations, 0),
            "observed_rotations": (self.observed_rotations, 0),
            "transplants": (self.transplants, 0),
            "least": (self.least, 2),
        }
        for name, (value, smallest) in bounds.items():
            if value < smallest:
                raise ValueError(
                    f"{name} must be at least {smallest} in a causal test, got {value}; raise it"
                )
        for name in ("level", "leakage", "within", "carries", "carries_not"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name} of a causal test must be between 0 and 1, got {getattr(self, name)}; correct it"
                )
