"""Speeds of a machine: seconds of a batch as a fixed part and a part of every sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rate:
    """What a batch costs: work on weights, done once a batch, and work on its sequences.

    A batch of a few sequences of a wide model spends most of its time on the weights, so a rate per
    sequence alone would charge a large batch for weights it never touches again.

    Attributes:
        fixed: of every batch.
        each: of every sequence.
    """

    fixed: float = 0.0
    each: float = 0.0

    @classmethod
    def through(cls, small: tuple[int, float], large: tuple[int, float]) -> Rate:
        """The line through two measured batches, (sequences, cost); never falling, never below zero.

        >>> Rate.through((1, 3.0), (4, 6.0)), Rate.through((2, 4.0), (2, 4.0))
        (Rate(fixed=2.0, each=1.0), Rate(fixed=0.0, each=2.0))
        >>> Rate.through((1, 5.0), (2, 4.0))
        Rate(fixed=4.0, each=0.0)
        """
        (few, less), (many, more) = small, large
        if many <= few:
            return cls(0.0, more / many)
        each = max(0.0, more - less) / (many - few)
        fixed = more - many * each
        return cls(fixed, each) if fixed >= 0 else cls(0.0, more / many)

    def batch(self, sequences: float) -> float:
        """Of one batch."""
        return self.fixed + self.each * sequences

    def total(self, sequences: int, size: int) -> float:
        """Of all batches of ``size`` that hold these sequences, the last one filled up.

        >>> Rate(10.0, 1.0).total(5, 4)
        28.0
        """
        batches = -(-sequences // min(size, sequences))
        return batches * self.batch(min(size, sequences))

    def scaled(self, fixed: float, each: float) -> Rate:
        """With both parts multiplied."""
        return Rate(self.fixed * fixed, self.each * each)

    def plus(self, other: Rate, times: float = 1.0) -> Rate:
        """This and ``times`` another."""
        return Rate(self.fixed + times * other.fixed, self.each + times * other.each)


@dataclass(frozen=True)
class Speeds:
    """Measured on this machine with the run's model or a smaller one of its kind, in seconds.

    Attributes:
        training_step: one optimiser step.
        forward: one plain pass of a batch.
        slopes: derivatives of a batch of the select split before any direction is taken.
        row: what every direction adds.
        product: one Hessian-vector product, a batch of the curvature split.
        linearise: setting up products at a checkpoint, the same.
        slopes_setup: what the first batch's slopes cost beyond that: checks, traces.
        product_setup: the same of products.
        read: reading one checkpoint.
        write: writing one vector of N entries.
        vector: adding a multiple of one vector of N entries to another.
        base_bytes: resident memory before any derivative: libraries, data, the model.
        batch_bytes: what a linearised batch holds.
        sequence_bytes: what reverse mode keeps of a sequence for products with a Hessian.
        curvature_route: how products with the Hessian were taken, None where none were.
    """

    training_step: float
    forward: Rate
    slopes: Rate
    row: Rate
    product: Rate
    linearise: Rate
    slopes_setup: float
    product_setup: float
    read: float
    write: float
    vector: float
    base_bytes: int
    batch_bytes: Rate = Rate()
    sequence_bytes: float = 0.0
    curvature_route: str | None = None

    def of_whole(self, weights: float, work: float, activations: float, layers: float) -> Speeds:
        """Speeds of the whole model from those of one that stood in for it.

        Args:
            weights: parameters of the whole one over the other's.
            work: multiplications a sequence, the same.
            activations: numbers held a sequence, the same.
            layers: the same; a trace goes through every layer once.
        """
        return replace(
            self,
            forward=self.forward.scaled(weights, work),
            slopes=self.slopes.scaled(weights, work),
            row=self.row.scaled(weights, work),
            slopes_setup=self.slopes_setup * layers,
            product_setup=self.product_setup * layers,
            product=self.product.scaled(weights, work),
            linearise=self.linearise.scaled(weights, work),
            read=self.read * weights,
            write=self.write * weights,
            vector=self.vector * weights,
            batch_bytes=self.batch_bytes.scaled(weights, activations),
            sequence_bytes=self.sequence_bytes * activations,
        )
