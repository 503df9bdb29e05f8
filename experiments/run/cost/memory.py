"""Peak memory and transient disk of a run, counted in vectors of N entries, tables of tokens and batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from experiments.config import RunConfig
from experiments.run.cost.rates import Speeds
from experiments.run.cost.sizes import Sizes, curvature_work, is_traced, products
from experiments.run.cost.stages import linearised
from experiments.run.memory.budget import krylov_in_files, memory_shares
from polca_edit.derivatives.curvature import UNDER_WAY

#: Vectors of N entries beside the model's own: three cached checkpoints and a displacement in slopes and in
#: a trajectory basis; in a Hessian basis the weights, the warm start and, one after the other, a product with
#: its gradient and block, or what Lanczos makes of its image. A trace has its own weights and tangents too.
STREAMED, LANCZOS, TRACED = 4, 6, 2


@dataclass(frozen=True)
class Need:
    """Bytes of one kind of work, at its most.

    Attributes:
        held: that must be there.
        mapped: of files, whose pages stay in memory while there is room and go where there is none.
    """

    held: int
    mapped: int = 0

    def within(self, room: float) -> int:
        """What is resident where this many bytes are there for it."""
        return self.held + round(min(self.mapped, max(0.0, room - self.held)))


def peak_bytes(sizes: Sizes, speeds: Speeds, config: RunConfig) -> int:
    """The largest stage: building a basis, or taking slopes along all rows; mapped pages as a budget lets."""
    room = math.inf if config.memory_gb is None else config.memory_gb * 1e9 - speeds.base_bytes
    return round(speeds.base_bytes + max(need.within(room) for need in needs(sizes, speeds, config)))


def needs(sizes: Sizes, speeds: Speeds, config: RunConfig) -> list[Need]:
    """What every basis asks for while it is built, and slopes last, beside the program and the model."""
    vector, shares = sizes.parameters * config.itemsize, memory_shares(config, sizes.parameters)
    work = curvature_work(sizes, speeds.sequence_bytes, shares.curvature)
    found = []
    for spec, basis in zip(config.bases, sizes.bases, strict=True):
        row = basis.columns_of(sizes.parameters) * config.itemsize
        rows = basis.vectors * row
        held = min(rows, shares.rows)
        mapped = rows - held
        if basis.kind == "hessian" and basis.taken:
            most = _products_of_one(sizes, spec.tolerance, spec.max_products) * spec.per_checkpoint
            deep = krylov_in_files(config, spec, row, shares.rows)
            krylov = round(2 * most * row)
            stay, streamed = linearised(sizes, speeds, shares.curvature)
            kept = (stay + min(1, streamed) + UNDER_WAY) * speeds.batch_bytes.batch(work.size)
            beside = vector + (LANCZOS - 1) * row + (TRACED * vector if is_traced(work, spec, basis) else 0)
            inside = held + beside + round(kept)
            found.append(Need(inside, mapped + krylov) if deep else Need(inside + krylov, mapped))
        elif basis.kind == "trajectory":
            found.append(Need(held + (STREAMED + shares.displacements + 2) * vector, mapped))
    stored = sum(basis.bytes_of(sizes.parameters) for basis in sizes.measured)
    # Rows of bases are taken where they lie, unless they are stored in fewer bits; residuals are made.
    directions = 2 * len(sizes.measured)
    if config.basis_storage != "float32":
        directions += sum(basis.vectors for basis in sizes.measured)
    directions = min(directions, config.vector_block or directions)
    table = 2 * sizes.select_tokens * sizes.places * sizes.rows * config.itemsize
    held = stored if config.memory_gb is None else min(stored, shares.rows)
    batch = speeds.batch_bytes.batch(min(config.batch_size, sizes.curvature))
    slopes = min(batch, shares.slopes) if batch else shares.slopes
    found.append(Need(held + (STREAMED + directions) * vector + table + round(slopes), stored - held))
    return found


def _products_of_one(sizes: Sizes, tolerance: float, most: int) -> int:
    """Products at a basis checkpoint behind the first."""
    two, one = (products("hessian", n, tolerance, most, sizes.parameters) for n in (2, 1))
    return two - one


def transient_bytes(sizes: Sizes, config: RunConfig) -> int:
    """The largest basis's finished parts, kept products and, where they are mapped, tables."""
    shares = memory_shares(config, sizes.parameters)
    found = [0]
    for spec, basis in zip(config.bases, sizes.bases, strict=True):
        row = basis.columns_of(sizes.parameters) * config.itemsize
        rows = basis.vectors * row
        mapped = rows if rows > shares.rows else 0
        if basis.kind == "hessian" and basis.taken:
            each = _products_of_one(sizes, spec.tolerance, spec.max_products) * spec.per_checkpoint
            deep = krylov_in_files(config, spec, row, shares.rows)
            # A part holds its vectors and as many that follow.
            found.append(2 * rows + mapped + each * row * (3 if deep else 1))
        elif basis.kind == "trajectory":
            found.append(mapped)
    return max(found)


def memory_warnings(sizes: Sizes, speeds: Speeds, config: RunConfig) -> list[str]:
    """What to change where the budget is too small for the plan, tried on the plan itself."""
    if config.memory_gb is None:
        return []
    budget, peak = config.memory_gb * 1e9, peak_bytes(sizes, speeds, config)
    if peak <= budget:
        return []
    said = f"peak memory {peak / 1e9:.1f} GB is above the budget of {config.memory_gb:g} GB"
    while any(basis.vectors > 1 for basis in sizes.bases):
        sizes = fewer_vectors(sizes)
        if peak_bytes(sizes, speeds, config) <= budget:
            left = zip(config.bases, sizes.bases, strict=True)
            return [f"{said}; set vectors to { {spec.label: basis.vectors for spec, basis in left} }"]
    least = peak_bytes(sizes, speeds, config)
    return [f"{said} and fewer vectors do not go below {least / 1e9:.1f} GB; raise --memory"]


def fewer_vectors(sizes: Sizes) -> Sizes:
    """The same with half of the vectors."""
    return replace(sizes, bases=tuple(basis.fewer(0.5, 1) for basis in sizes.bases))
