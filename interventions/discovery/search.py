"""Search in the span of a basis for directions whose own undone movement takes one group of tokens.

For a unit vector u in span(B) the edit is theta - u <u, theta_end - theta_start>. With m the movement's K
coordinates, its coordinates are c = a <a, m>: the sphere through 0 and m whose diameter is |m|. Undoing
along several orthonormal directions at once stays on that sphere (P m = a <a, m> with a = P m / |P m|),
so rank one is all there is to search.

Many groups are searched together. Every damage is measured once, on all tokens, and serves every group; a
kernel regression (Matern 3/2) over the measured directions says where to measure next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interventions.causal.statistics import Array, Bits
from interventions.damage import EvaluatedSplit
from interventions.edits import Edit
from polca_edit.derivatives.lanczos import exact_length
from polca_edit.seeds import generator_for

#: Length scales of the kernel that are tried, as shares of the diameter |m|.
LENGTHS = (0.25, 0.5, 1.0, 2.0)
#: Ridge of the kernel regression, on a kernel with ones on its diagonal.
RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class AxisTarget:
    """One group of tokens and what must be left alone, on one split.

    Attributes:
        name: of the group.
        members: (M,) the target C.
        others: name -> (M,) off-target groups, without tokens of C.
        rest: (M,) rest of the parent of C; None where C is a parent or has none.
    """

    name: str
    members: Bits
    others: Mapping[str, Bits]
    rest: Bits | None = None


@dataclass(frozen=True)
class ScoreSettings:
    """What a search maximises: n_C - leak mean_j n_j+ - excess (max_j n_j - tolerated)+ - rest n_rest+.

    Attributes:
        leak: weight of the mean share lost by the other groups.
        tolerated: share that any other group may lose at no further cost.
        excess: weight of what the worst other group loses beyond that.
        rest: weight of the share lost by the rest of the parent.
    """

    leak: float = 1.0
    tolerated: float = 0.05
    excess: float = 1.0
    rest: float = 0.35


class Scores:
    """The scores of many targets as functions of capped damage, one column a group.

    Args:
        targets: on one split.
        headroom: (M,) nats.
        settings: weights.
    """

    def __init__(self, targets: Sequence[AxisTarget], headroom: Array, settings: ScoreSettings) -> None:
        room = np.maximum(headroom, 0.0)
        columns: list[Array] = []
        known: dict[bytes, int] = {}

        def column(mask: Bits) -> int:
            key = mask.tobytes()
            if key not in known:
                known[key] = len(columns)
                columns.append(mask / max(float(room[mask].sum()), 1e-12))
            return known[key]

        for target in targets:
            if not room[target.members].sum() > 0:
                raise ValueError(
                    f"an axis needs a target with headroom, '{target.name}' has none: nothing was learned "
                    "there since the reference; take another group or reference"
                )
        self.settings = settings
        self.own = torch.tensor([column(t.members) for t in targets])
        others = [[column(m) for m in t.others.values()] for t in targets]
        rest = [None if t.rest is None else column(t.rest) for t in targets]
        self.weights = torch.from_numpy(np.stack(columns, axis=1))
        self.others = torch.zeros(len(targets), len(columns), dtype=torch.bool)
        self.rest = torch.zeros(len(targets), len(columns), dtype=torch.bool)
        for i, (off, inside) in enumerate(zip(others, rest, strict=True)):
            self.others[i, off] = True
            if inside is not None:
                self.rest[i, inside] = True

    def shares(self, capped: Float[Tensor, "E M"]) -> Float[Tensor, "E C"]:
        """Share of its headroom that every distinct group loses, from min(D, G+)."""
        return capped.double() @ self.weights

    def of(self, shares: Float[Tensor, "E C"], target: Tensor) -> Float[Tensor, " E"]:
        """Score of row e for target number ``target[e]``; differentiable in the shares."""
        s, rows = self.settings, torch.arange(len(shares))
        off, positive = self.others[target], shares.clamp_min(0)
        count = off.sum(1).clamp_min(1)
        mean = (positive * off).sum(1) / count
        worst = torch.where(off, shares, -torch.inf).amax(1)
        beyond = (worst - s.tolerated).clamp_min(0)
        inside = (positive * self.rest[target]).sum(1)
        return shares[rows, self.own[target]] - s.leak * mean - s.excess * beyond - s.rest * inside


@dataclass
class DirectionLibrary:
    """Directions of a span whose own movement was undone, with what that did to every token.

    Attributes:
        split: tokens of the search.
        rows: (K, N) orthonormal.
        units: (E, K) unit vectors measured so far.
        capped: (E, M) min(D, G+) of each, nats.
    """

    split: EvaluatedSplit
    rows: Float[Tensor, "K N"]
    units: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    capped: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def __post_init__(self) -> None:
        self.along: Float[Tensor, " K"] = self.split.movement.along(self.rows)
        whole = exact_length(self.split.movement.displacement)
        if not float(self.along.norm()) > 1e-9 * max(whole, 1e-300):
            raise ValueError(
                f"an axis needs movement inside the span to undo, it holds {float(self.along.norm()):.3g} of "
                f"{whole:.3g}; take another basis or window"
            )
        if not len(self.units):
            self.units = torch.zeros(0, len(self.rows), dtype=torch.float64)
            self.capped = torch.zeros(0, self.split.tokens.count, dtype=torch.float64)

    @property
    def room(self) -> Float[Tensor, " M"]:
        """G+, nats."""
        return self.split.headroom.double().clamp_min(0)

    def edit(self, unit: Float[Tensor, " K"]) -> Edit:
        """The own movement along a unit vector of the span undone."""
        row = (unit.to(self.rows) @ self.rows)[None]
        undone = -(unit.double() @ self.along)
        return Edit(self.split.movement.base, row, undone[None], "project_out")

    def measure(self, units: Float[Tensor, "E K"], progress: Callable[[int], None] | None = None) -> None:
        """Add directions, one forward pass each."""
        units = units.double() / units.double().norm(dim=1, keepdim=True)
        changes = self.split.changes((self.edit(unit) for unit in units), progress=progress)
        self.units = torch.cat([self.units, units])
        self.capped = torch.cat([self.capped, torch.minimum(changes, self.room)])

    def fill(self, count: int, generator: torch.Generator) -> None:
        """Random directions (and the basis's own) until there are ``count``."""
        missing = count - len(self.units)
        if missing <= 0:
            return
        size = len(self.rows)
        own = torch.eye(size, dtype=torch.float64) if not len(self.units) else torch.zeros(0, size)
        drawn = torch.randn(max(0, missing - len(own)), size, generator=generator, dtype=torch.float64)
        self.measure(torch.cat([own[:missing].double(), drawn]))

    def points(self, units: Float[Tensor, "E K"]) -> Float[Tensor, "E K"]:
        """Coordinates of the undone movement in units of |m|."""
        found: Tensor = units * (units @ self.along)[:, None] / self.along.norm()
        return found


@dataclass(frozen=True)
class Surrogate:
    """Kernel regression of group shares on the place of the undone movement.

    Attributes:
        points: (E, K) measured places, in units of |m|.
        coefficients: (E, C) of the kernel.
        length: of the kernel.
        explained: (C,) share of each group's variance that is predicted when a direction is left out.
    """

    points: Float[Tensor, "E K"]
    coefficients: Float[Tensor, "E C"]
    length: float
    explained: Float[Tensor, " C"]

    def __call__(self, points: Float[Tensor, "P K"]) -> Float[Tensor, "P C"]:
        """Predicted shares; differentiable."""
        predicted: Tensor = matern(points, self.points, self.length) @ self.coefficients
        return predicted


def matern(left: Float[Tensor, "P K"], right: Float[Tensor, "E K"], length: float) -> Float[Tensor, "P E"]:
    """Matern 3/2 kernel, (1 + r) exp(-r) with r = sqrt(3) |x - y| / length.

    >>> round(float(matern(torch.zeros(1, 2), torch.zeros(1, 2), 1.0)), 6)
    1.0
    """
    square = (left[:, None] - right[None]).square().sum(-1)
    r = (3 * square + 1e-12).sqrt() / length
    return (1 + r) * torch.exp(-r)


def fit_surrogate(points: Float[Tensor, "E K"], shares: Float[Tensor, "E C"]) -> Surrogate:
    """The length that predicts left-out directions best, by the closed form of leave-one-out."""
    found: Surrogate | None = None
    spread = (shares - shares.mean(0)).square().sum(0).clamp_min(1e-12)
    for length in LENGTHS:
        kernel = matern(points, points, length) + RIDGE * torch.eye(len(points), dtype=torch.float64)
        inverse = torch.linalg.inv(kernel)
        coefficients = inverse @ shares
        left_out = coefficients / inverse.diagonal()[:, None]
        explained = 1 - left_out.square().sum(0) / spread
        if found is None or float(explained.mean()) > float(found.explained.mean()):
            found = Surrogate(points, coefficients, length, explained)
    assert found is not None
    return found


@dataclass(frozen=True)
class SearchSettings:
    """How hard a search looks; the same for targets and for null sets.

    Attributes:
        directions: random directions that are measured first, shared by all targets.
        rounds: times every target proposes a direction that is then measured.
        starts: measured directions from which each proposal climbs.
        climb: steps of a climb on the surrogate.
        rate: step length of a climb (Adam, on vectors of length one).
        seed: of the random directions.
    """

    directions: int = 256
    rounds: int = 4
    starts: int = 3
    climb: int = 60
    rate: float = 0.1
    seed: int = 0


def pooled_search(
    library: DirectionLibrary,
    scores: Scores,
    settings: SearchSettings,
    *,
    off: Float[Tensor, "k K"] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Float[Tensor, "S K"], Float[Tensor, " S"]]:
    """The best direction found for every target, and its measured score.

    Args:
        library: grows by one direction a target and round.
        scores: of S targets, on the library's tokens.
        settings: how hard to look.
        off: orthonormal directions that the found ones must be orthogonal to (deflation).
        progress: called with the number of rounds done.
    """
    generator = generator_for(settings.seed, "pooled_search")
    library.fill(settings.directions, generator)
    count = len(scores.own)

    def kept(units: Tensor) -> Tensor:
        units = units if off is None else units - units @ off.T @ off
        found: Tensor = units / units.norm(dim=1, keepdim=True).clamp_min(1e-30)
        return found

    first = 0 if off is None else len(library.units)
    for number in range(settings.rounds):
        shares = scores.shares(library.capped)
        surrogate = fit_surrogate(library.points(library.units), shares)
        measured = _table(scores, shares, count)
        best = torch.topk(measured, min(settings.starts, len(library.units)), dim=1).indices
        begin = kept(library.units[best.flatten()] + 0.02 * _noise(best.numel(), library, generator))
        which = torch.arange(count).repeat_interleave(best.shape[1])
        units, predicted = _climb(library, surrogate, scores, begin, which, settings, kept)
        top = predicted.view(count, -1).argmax(1)
        library.measure(units.view(count, best.shape[1], -1)[torch.arange(count), top])
        if progress is not None:
            progress(number + 1)
    measured = _table(scores, scores.shares(library.capped[first:]), count)
    value, index = measured.max(1)
    return library.units[first:][index], value


def _noise(count: int, library: DirectionLibrary, generator: torch.Generator) -> Tensor:
    return torch.randn(count, len(library.rows), generator=generator, dtype=torch.float64)


def _table(scores: Scores, shares: Tensor, count: int) -> Float[Tensor, "S E"]:
    """Measured score of every direction for every target."""
    return torch.stack([scores.of(shares, torch.full((len(shares),), i)) for i in range(count)])


def _climb(
    library: DirectionLibrary,
    surrogate: Surrogate,
    scores: Scores,
    begin: Tensor,
    which: Tensor,
    settings: SearchSettings,
    kept: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Adam on the surrogate's score from every start, best point of each path."""
    raw = begin.clone().requires_grad_()
    adam = torch.optim.Adam([raw], lr=settings.rate)
    best, reached = begin.clone(), torch.full((len(begin),), -torch.inf, dtype=torch.float64)
    for step in range(settings.climb):
        for group in adam.param_groups:
            group["lr"] = settings.rate * (1 - step / settings.climb)
        with torch.enable_grad():
            units = kept(raw)
            value = scores.of(surrogate(library.points(units)), which)
            (gradient,) = torch.autograd.grad(-value.sum(), raw)
        better = value.detach() > reached
        reached = torch.where(better, value.detach(), reached)
        best = torch.where(better[:, None], units.detach(), best)
        raw.grad = gradient
        adam.step()
    return best, reached
