"""The rows of the table. Every comparison first checks that both sides give the same result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.problems import Problem, text_problem, trained_arithmetic
from benchmarks.pseudocode import pseudocode_pipeline
from benchmarks.timing import Clock, Row, Skipped, interleaved, time_once
from polca_edit.allocation.allocate import allocate, project
from polca_edit.allocation.terms import second_order_terms
from polca_edit.basis.hessian import EigenSettings, Keeping, hessian_basis
from polca_edit.basis.record import Basis
from polca_edit.clusters.density import ClusterSettings, cluster_trajectories
from polca_edit.derivatives.objective import Objective
from polca_edit.models import TransformerShape

TOLERANCE = 1e-3
EIGEN = EigenSettings(tolerance=TOLERANCE, max_products=100)


def arithmetic_shape(d_model: int) -> TransformerShape:
    """Two layers of the given width."""
    return TransformerShape(2, d_model, 4, 4 * d_model, 12, 12, 10)


def our_basis(problem: Problem, objective: Objective) -> Basis:
    """Algorithm 1, one vector per checkpoint."""
    return hessian_basis(objective, problem.checkpoints, problem.curvature, len(problem.checkpoints), EIGEN)


def true_residual(problem: Problem, objective: Objective, index: int, rows: Tensor, vector: Tensor) -> float:
    """Relative eigen-residual of a unit vector for the projected Hessian, in float64 after the product."""
    product = objective.hessian(problem.checkpoints[index], problem.curvature, expected=1000)
    image = product(vector).double()
    image = image - rows.double().T @ (rows.double() @ image)
    value = float(vector.double() @ image)
    return float((image - value * vector.double()).norm()) / abs(value)


EACH_SIDE_GETS = {
    "basis_vs_curvlinops": "both start at the last checkpoint's next Ritz vector; each stops by its own "
    "test of the same tolerance (the true residuals are given); our trace is made once, see setup_seconds",
    "basis_vs_hessian_eigenthings": "the rival takes no start vector and no stopping rule, so it is run with "
    "10, 20, 40 ... iterations until it reports the tolerance; our trace is made once, see setup_seconds",
}


def product_floor(row: Row, checkpoints: int) -> str:
    """What a Hessian-vector product must cost, and what this row paid for one."""
    ours = row.notes["ours_in_forward_passes"] / row.notes["our_products"]
    rival = row.notes["rival_in_forward_passes"] / row.notes["rival_products"]
    return (
        "an exact product needs six matrix products per weight where a forward pass needs one; a product "
        f"with everything around it took {ours:.1f} forward passes here and {rival:.1f} there, "
        f"{row.notes['our_products'] / checkpoints:.1f} products per checkpoint here and "
        f"{row.notes['rival_products'] / checkpoints:.1f} there; warm starts from a subsample, from more "
        "Ritz vectors or from the movement of the weights were tried and save no products"
    )


def contraction_floor(case: Problem, vectors: int, scored: int, row: Row) -> str:
    """Least multiply-adds per weight and sequence of the exact routes, in units of a forward pass."""
    length = case.tokens.inputs.shape[1] - 1
    formed = scored * (length + vectors) / length
    return (
        f"multiply-adds per weight and sequence, forward pass = 1: per-token gradients and their products "
        f"with the vectors (scored tokens x (positions + vectors)) {formed:.1f}, plus {scored} backward "
        f"passes; forward mode (two products per weight and vector) {2 * vectors}; one product per weight "
        f"and vector, from given cotangents, {vectors}, plus {scored} backward passes. A forward pass also "
        f"holds attention and activations, so measured passes can lie below these; the other side took "
        f"{row.notes['rival_in_forward_passes']:.0f}"
    )


def basis_rows(
    checkpoints: int, sums: int, d_model: int, pairs: int, clock: Clock
) -> Iterator[Row | Skipped]:
    """Bases of several checkpoints to a relative residual of 1e-3, against the two libraries."""
    problem = trained_arithmetic(
        arithmetic_shape(d_model), checkpoints=checkpoints, spacing=40, sums=sums, curvature=sums
    )
    names = {"basis_vs_curvlinops": "curvlinops", "basis_vs_hessian_eigenthings": "hessian_eigenthings"}
    objective = problem.objective("traced")
    setup = time_once(
        lambda: objective.hessian(problem.checkpoints[0], problem.curvature, expected=1000), clock
    )
    found = our_basis(problem, objective)
    residuals = [
        true_residual(problem, objective, i, found.rows[:i], found.rows[i]) for i in range(len(found))
    ]
    assert max(residuals) <= 1.5 * TOLERANCE, residuals
    starts = torch.cat([torch.randn(1, problem.space.size), found.rows[:-1]])

    def rival_basis(pair: Any) -> tuple[list[Tensor], int]:
        rows, used = problem.space.read(problem.module).new_zeros(0, problem.space.size), 0
        for index in range(len(problem.checkpoints)):
            problem.space.write(problem.module, problem.checkpoints[index])
            (_, vector), products = pair(index, rows)
            vector = vector - rows.T @ (rows @ vector)
            rows, used = torch.cat([rows, vector[None] / vector.norm()]), used + products
        return list(rows), used

    def by_curvlinops(index: int, rows: Tensor) -> Any:
        # eigsh gets the same kind of start: where our own search began at this checkpoint.
        start = starts[index] if index == 0 else problem_starts[index]
        return rivals.curvlinops_pair(problem, rows if len(rows) else None, start, TOLERANCE)

    problem_starts = successor_starts(problem, objective)

    def by_eigenthings(index: int, rows: Tensor) -> Any:
        return rivals.eigenthings_pair(problem, rows if len(rows) else None, TOLERANCE)

    for name, pair in zip(names, (by_curvlinops, by_eigenthings), strict=True):
        reason = rivals.missing(names[name])
        if reason:
            yield Skipped(name, reason)
            continue
        theirs, used = rival_basis(pair)
        overlap = min(abs(float(a @ b)) for a, b in zip(theirs, found.rows, strict=True))
        row = interleaved(
            name,
            lambda: our_basis(problem, objective),
            lambda pair=pair: rival_basis(pair),  # type: ignore[misc]
            pairs=pairs,
            clock=clock,
            floor=lambda: objective.losses(problem.checkpoints[0], problem.curvature),
            checkpoints=checkpoints,
            parameters=problem.space.size,
            our_products=found.products,
            rival_products=used,
            our_residual=max(residuals),
            rival_residual=max(
                true_residual(problem, objective, i, torch.stack(theirs)[:i], theirs[i])
                for i in range(checkpoints)
            ),
            smallest_overlap=overlap,
            setup_seconds=setup,
        )
        scale = 20 / checkpoints
        row.notes["ratio_with_setup_20_checkpoints"] = row.rival * scale / (row.ours * scale + setup)
        row.notes["each_side_gets"] = EACH_SIDE_GETS[name]
        if names[name] == "hessian_eigenthings":
            # It ran 10, 20, 40 ... iterations per checkpoint; only the last run counts had it been known.
            row.notes["rival_products_had_the_number_been_known"] = (used + 10 * checkpoints) // 2
        row.notes["floor"] = product_floor(row, checkpoints)
        yield row


def successor_starts(problem: Problem, objective: Objective) -> Tensor:
    """(T, N) the warm start our Lanczos used at each checkpoint (row 0 is not used)."""
    kept: list[Tensor] = []
    keeping = Keeping(on_checkpoint=lambda part: kept.append(part.following[0].clone()))  # type: ignore[index]
    count = len(problem.checkpoints)
    hessian_basis(objective, problem.checkpoints, problem.curvature, count, EIGEN, keeping=keeping)
    return torch.stack([kept[0], *kept[:-1]])


def allocation_rows(
    sums: int, d_model: int, vectors: int, pairs: int, clock: Clock
) -> Iterator[Row | Skipped]:
    """Directional derivatives: passes per vector against plain jvp, and against per-token gradients."""
    problem = trained_arithmetic(arithmetic_shape(d_model), checkpoints=1, spacing=5, sums=sums, curvature=8)
    theta, rows = problem.checkpoints[0], problem.rows(vectors)
    ours, plain = problem.objective(), problem.objective("jvp")
    setup = time_once(lambda: ours.directional(theta, rows, problem.tokens, expected=1000), clock)
    slopes = ours.directional(theta, rows, problem.tokens, expected=1000)[1]
    reference = plain.directional(theta, rows, problem.tokens)[1]
    error = float((slopes - reference).abs().max() / reference.abs().max())
    assert error < 1e-4, error
    base: dict[str, Any] = {"parameters": problem.space.size, "vectors": vectors, "scored_per_sequence": 4}
    row = interleaved(
        "allocation_forward_passes",
        lambda: ours.directional(theta, rows, problem.tokens, expected=1000),
        lambda: plain.directional(theta, rows, problem.tokens),
        pairs=pairs,
        clock=clock,
        scale_ours=1 / vectors,
        scale_rival=1 / vectors,
        floor=lambda: ours.losses(theta, problem.tokens),
        route=ours.route_used,
        relative_error=error,
        first_call_seconds=setup,
        **base,
    )
    # The figure of this row is passes, not seconds.
    notes = dict(row.notes)
    passes = notes.pop("ours_in_forward_passes"), notes.pop("rival_in_forward_passes")
    yield Row(
        row.name, *passes, row.ratio_median, row.ratio_min, row.ratio_max, pairs, "forward passes", notes
    )

    many = text_problem(TransformerShape(2, d_model, 4, 4 * d_model, 64, 129, 64), 2, 128)
    for name, case, at_once in (("4", problem, 8), ("128", many, 1)):
        yield token_gradient_row(name, case, vectors, at_once, pairs, clock)


def token_gradient_row(name: str, case: Problem, vectors: int, at_once: int, pairs: int, clock: Clock) -> Row:
    """One comparison with per-token gradients."""
    point, directions, mine = case.checkpoints[0], case.rows(vectors), case.objective()
    first = time_once(lambda: mine.directional(point, directions, case.tokens, expected=1000), clock)
    found = mine.directional(point, directions, case.tokens, expected=1000)[1]
    theirs = rivals.token_gradients(case, point, directions, at_once)
    error = float((found - theirs).abs().max() / theirs.abs().max())
    assert error < 1e-4, error
    row = interleaved(
        f"allocation_vs_per_token_gradients_{name}",
        lambda: mine.directional(point, directions, case.tokens, expected=1000),
        lambda: rivals.token_gradients(case, point, directions, at_once),
        pairs=pairs,
        clock=clock,
        floor=lambda: mine.losses(point, case.tokens),
        route=mine.route_used,
        relative_error=error,
        first_call_seconds=first,
        parameters=case.space.size,
        vectors=vectors,
        scored_per_sequence=int(name),
    )
    row.notes["floor"] = contraction_floor(case, vectors, int(name), row)
    return row


def our_pipeline(problem: Problem, objective: Objective) -> Tensor:
    """Basis, projections, Eq. 6, clusters."""
    basis = our_basis(problem, objective)
    (measured,) = project(objective, problem.checkpoints, [basis], problem.tokens)
    means, curvatures = second_order_terms(objective, problem.checkpoints, basis, problem.curvature)
    from dataclasses import replace

    allocation = allocate(replace(measured, mean_gradients=means, curvatures=curvatures), "second_order")
    cluster_trajectories(allocation.projected_loss(), ClusterSettings(drop_rising_tokens=False))
    return allocation.values


def pipeline_row(checkpoints: int, sums: int, d_model: int, pairs: int, clock: Clock) -> Row:
    """The whole observation against the pseudocode, set-up counted in the note."""
    problem = trained_arithmetic(
        arithmetic_shape(d_model), checkpoints=checkpoints, spacing=40, sums=sums, curvature=sums
    )
    objective = problem.objective()
    setup = time_once(lambda: our_pipeline(problem, objective), clock)
    ours = our_pipeline(problem, objective)
    theirs = pseudocode_pipeline(problem, TOLERANCE)[0]
    # Eigenvectors agree up to sign, and Eq. 6 does not see the sign.
    difference = float((ours - theirs).abs().median() / theirs.abs().median())
    return interleaved(
        "pipeline_vs_pseudocode",
        lambda: our_pipeline(problem, objective),
        lambda: pseudocode_pipeline(problem, TOLERANCE),
        pairs=pairs,
        clock=clock,
        floor=lambda: objective.losses(problem.checkpoints[0], problem.tokens),
        median_relative_difference=difference,
        first_run_seconds_with_setup=setup,
        checkpoints=checkpoints,
        tokens=problem.tokens.count,
        parameters=problem.space.size,
    )
