"""Which checkpoints are kept: against brute force, a planted bend, and training never interrupted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import SETTINGS, Noisy, Stopped, batch_loss, contents
from torch import nn

from polca_edit.allocation.allocate import allocate, project
from polca_edit.allocation.gaps import interval_errors, sparse_intervals
from polca_edit.basis.record import unlabelled
from polca_edit.checkpoints.files import SeriesFolder
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.spacing import Adaptive, Thinning, merging_costs, steps_to_keep
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.recording import Recorder
from polca_edit.tokens import TokenSet
from polca_edit.training import SeriesWriter, train


def curves(seed: int = 0, steps: int = 60, tokens: int = 5) -> torch.Tensor:
    """Losses (T, M) that fall by random amounts."""
    draw = torch.Generator().manual_seed(seed)
    return 9 - torch.rand(steps, tokens, generator=draw).cumsum(0) / 10


# -- the choice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 7, 20])
def test_thinning_is_that_of_a_slow_second_writing(count):
    losses = curves().numpy().astype(np.float64)
    thinning, left = Thinning(count), []

    def cost(left, k):
        """Change across the gap that k would leave, times the fourth root of its steps."""
        a, b = left[k - 1], left[k + 1]
        return np.mean(np.abs(losses[b] - losses[a])) * np.sqrt(np.sqrt(10 * (b - a)))

    for step in range(len(losses)):
        dropped = thinning.offer(10 * step, torch.from_numpy(losses[step]))
        left.append(step)
        if len(left) > count:
            gone = left.pop(1 + int(np.argmin([cost(left, k) for k in range(1, len(left) - 1)])))
            assert dropped == (10 * gone,)
        else:
            assert dropped == ()
        assert thinning.steps == [10 * step for step in left]
    assert (thinning.steps[0], thinning.steps[-1], len(thinning.steps)) == (0, 590, count)


def test_a_planted_bend_gets_nearly_all_checkpoints():
    steps = list(range(0, 101, 2))
    losses = torch.tensor([[1 / (1 + math.exp((step - 50) / 2))] for step in steps])
    online = Thinning(11)
    for step, row in zip(steps, losses, strict=True):
        online.offer(step, row)
    for kept in (online.steps, steps_to_keep(steps, losses, 11)):
        assert (kept[0], kept[-1], len(kept)) == (0, 100, 11)
        assert sum(40 <= step <= 60 for step in kept) >= 7


def test_a_loss_that_is_not_a_number_hides_no_other():
    losses = curves(steps=12)
    losses[4] = math.nan
    touched = torch.isinf(merging_costs(range(12), losses)).nonzero()[:, 0].tolist()
    assert touched == [2, 4]  # costs that ask for the fifth checkpoint
    losses = losses[:9]
    assert len(steps_to_keep(range(9), losses, 4)) == 4


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="at least 3"):
        Thinning(2)
    thinning = Thinning(3)
    thinning.offer(5, torch.zeros(2))
    with pytest.raises(ValueError, match="one fixed batch"):
        thinning.offer(6, torch.zeros(3))
    with pytest.raises(ValueError, match="in order"):
        thinning.offer(5, torch.zeros(2))
    with pytest.raises(ValueError, match="a row per step"):
        steps_to_keep([0, 1, 2], torch.zeros(4, 1), 3)


# -- the errors --------------------------------------------------------------------------------------


class Bent(nn.Module):
    """Every token's loss falls steeply in the middle of the path, the second part slowly everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        return torch.sigmoid(-120 * (self.theta[0] - 0.5) * x[:, :1]) + self.theta[1] ** 2 * x[:, 1:]


def bent(count: int = 101):
    """A straight path through the bend in equal steps, its tokens and objective."""
    module, draw = Bent(), torch.Generator().manual_seed(1)
    space = ParameterSpace.from_module(module)
    inputs = 0.5 + torch.rand(6, 2, generator=draw, dtype=torch.float64)
    tokens = TokenSet(inputs, torch.ones(6, 1, dtype=torch.bool), torch.arange(6))
    place = torch.linspace(0, 1, count, dtype=torch.float64)
    thetas = torch.stack([place, place.sin() / 10], 1)
    series = open_checkpoints(thetas, space, steps=range(count))
    return Objective(module, lambda m, x: m(x), space, route="double_backward"), series, tokens


def test_errors_of_intervals_are_those_of_the_allocation():
    objective, series, tokens = bent(21)
    chosen = [0, 4, 9, 10, 17, 20]
    own = interval_errors(objective, series, zip(chosen, chosen[1:], strict=False), tokens)
    nothing = unlabelled("path", torch.zeros(0, 2, dtype=torch.float64))
    allocation = allocate(project(objective, series.subset(chosen), [nothing], tokens)[0], "trapezoid")
    for row, pair in enumerate(zip(chosen, chosen[1:], strict=False)):
        assert torch.allclose(own.error[pair], allocation.quadrature_error[row], atol=1e-12)
        assert torch.allclose(own.exact[pair], allocation.exact[row], atol=1e-12)
    found, totals = own.of(chosen), allocation.totals()
    assert found.total == pytest.approx(totals["quadrature_error"] / totals["exact"])
    size = allocation.quadrature_error.sum(0).abs().mean() / allocation.exact.sum(0).abs().mean()
    assert (found.checkpoints, found.per_token) == (6, pytest.approx(float(size)))
    with pytest.raises(ValueError, match="in order"):
        interval_errors(objective, series, [(3, 3)], tokens)


def test_half_the_checkpoints_give_a_smaller_error_on_other_tokens():
    objective, series, tokens = bent()
    probe, others = tokens.select(torch.arange(2)), tokens.select(torch.arange(2, 6))
    losses = torch.stack([objective.losses(series[i], probe) for i in range(len(series))])
    equal = [round(i * 100 / 20) for i in range(21)]
    kept = steps_to_keep(range(101), losses, 11)
    pairs = [pair for chosen in (equal, kept) for pair in zip(chosen, chosen[1:], strict=False)]
    found = interval_errors(objective, series, pairs, others)
    assert found.of(kept).per_token < found.of(equal).per_token


def test_sparse_intervals_are_the_bend():
    objective, series, tokens = bent(11)
    pairs = [(i, i + 1) for i in range(10)]
    error = torch.stack([interval_errors(objective, series, pairs, tokens).error[pair] for pair in pairs])
    found = sparse_intervals(range(11), error, 0.9)
    assert {4, 5} <= {own.start for own in found}
    assert sum(own.share for own in found) >= 0.9
    assert sum(own.share for own in found[:-1]) < 0.9
    assert sparse_intervals([0, 1, 2], torch.zeros(2, 3)) == ()
    with pytest.raises(ValueError, match="a row per interval"):
        sparse_intervals([0, 1], error)


# -- training ----------------------------------------------------------------------------------------

CANDIDATES = tuple(range(0, 41, 2))


def probe(module: nn.Module) -> torch.Tensor:
    assert not module.training
    x = torch.linspace(-1, 1, 24).reshape(6, 4)
    return (module(x)[:, 0] - x.sum(1).sin()).square()


def adaptive_run(directory: Path, loss=batch_loss, count: int = 6) -> nn.Module:
    module = Noisy()
    space = ParameterSpace.from_module(module)
    writer = SeriesWriter(SeriesFolder(directory), space, CANDIDATES, 10, adaptive=Adaptive(count, probe))
    return train(module, loss, SETTINGS, recorder=writer)


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("adaptive")
    adaptive_run(directory)
    return directory


def test_training_is_what_it_is_without_a_probe_and_the_index_has_the_kept(adaptive):
    space, seen = ParameterSpace.from_module(Noisy()), {0: ParameterSpace.from_module(Noisy()).read(Noisy())}
    train(Noisy(), batch_loss, SETTINGS, after_step=lambda s, m, o: seen.update({s: space.read(m)}))
    series = open_checkpoints(adaptive, space)
    assert len(series) == 6
    assert all(torch.equal(series[i], seen[step]) for i, step in enumerate(series.steps))
    module, thinning = Noisy().eval(), Thinning(6)
    for step in CANDIDATES:
        space.write(module, seen[step])
        with torch.no_grad():
            thinning.offer(step, probe(module))
    assert list(series.steps) == thinning.steps
    assert series.learning_rates == tuple(SETTINGS.rate(step) if step else 0.0 for step in series.steps)
    # On disk: what the index has, and the weights of every state.
    on_disk = {int(path.stem.split("-")[1]) for path in adaptive.glob("step-*")}
    assert on_disk == {*series.steps, 10, 20, 30, 40}


@pytest.mark.parametrize("at", [1, 11, 23, 37])
def test_an_interrupted_adaptive_run_goes_on_to_the_same_bytes(adaptive, tmp_path, at):
    stopped, again = [], []

    def stops(module, step):
        if step == at and not stopped:
            stopped.append(step)
            raise Stopped
        if stopped:
            again.append(step)
        return batch_loss(module, step)

    with pytest.raises(Stopped):
        adaptive_run(tmp_path, stops)
    adaptive_run(tmp_path, stops)
    # Nothing before the last state is computed again.
    assert again == list(range((at - 1) // 10 * 10 + 1, 41))
    assert contents(tmp_path) == contents(adaptive)


# -- a loop of one's own -----------------------------------------------------------------------------


def own_loop(directory: Path, steps: int = 40) -> tuple[Recorder, dict[int, torch.Tensor], nn.Module]:
    torch.manual_seed(0)
    module = Noisy()
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
    recorder = Recorder(
        directory, module, optimiser, every=2, state_every=16, schedule=Adaptive(5, probe), include=("*",)
    )
    seen = {0: recorder.space.read(module)}
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        batch_loss(module.train(), step).backward()
        optimiser.step()
        recorder.step()
        assert module.training
        assert module.drop.training
        seen[step] = recorder.space.read(module)
        assert len(recorder.recorded) <= 5
    return recorder, seen, module


def test_a_recorder_keeps_so_many_and_a_stopped_one_opens(tmp_path):
    _, seen, module = own_loop(tmp_path / "c", 29)
    series = open_checkpoints(tmp_path / "c", ParameterSpace.from_module(module))
    assert (len(series), series.steps[0], series.steps[-1]) == (5, 0, 28)
    assert all(torch.equal(series[i], seen[step]) for i, step in enumerate(series.steps))
    on_disk = {int(path.stem.split("-")[1]) for path in (tmp_path / "c").glob("step-*")}
    assert on_disk == {*series.steps, 16}


def test_the_last_step_takes_a_place_even_where_the_weights_were_changed_since(tmp_path):
    recorder, seen, module = own_loop(tmp_path / "c", 31)
    recorder.hold()
    with torch.no_grad():
        module.first.weight.zero_()  # the best checkpoint loaded back, an average
    recorder.finish(seed=1)
    series = open_checkpoints(tmp_path / "c", ParameterSpace.from_module(module))
    assert (len(series), series.steps[-1]) == (5, 31)
    assert torch.equal(series[4], seen[31])
    assert series.learning_rates == pytest.approx((0.0, *[1e-2] * 4))
