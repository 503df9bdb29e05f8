"""Blocking holds what it says under every optimiser, and a branch repeats the recorded run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from interventions import blocking
from interventions.blocking import Curve, Hold, Retraining
from polca_edit.checkpoints.files import SeriesFolder, read_weights
from polca_edit.derivatives.lanczos import orthonormalise
from polca_edit.parameters import ParameterSpace
from polca_edit.training import SeriesWriter, TrainingSettings, train

SETTINGS = TrainingSettings(12, 0.05, 0.1, (0.9, 0.95), warmup=0)


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def batch_loss(module: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return (module(x)[:, 0] - x.prod(1)).square().mean()


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[SeriesFolder, ParameterSpace]:
    module = make_module()
    space = ParameterSpace.from_module(module)
    folder = SeriesFolder(tmp_path)
    train(module, batch_loss, SETTINGS, recorder=SeriesWriter(folder, space, range(0, 13, 2), 4))
    return folder, space


def unmeasured(_: nn.Module) -> dict[str, float]:
    """One group whose loss nobody asks for."""
    return {"all": 0.0}


def test_a_free_branch_repeats_the_run_bit_for_bit(recorded) -> None:
    folder, space = recorded
    start = blocking.open_branch_point(folder, space, 5)
    assert start.step == 4
    module = make_module()
    curve = blocking.run_arm(
        module, Retraining(space, batch_loss, SETTINGS, unmeasured, 4), start, 12, arm="none"
    )
    assert torch.equal(space.read(module), space.flatten(read_weights(folder.weights(12))))
    assert curve.steps == (4, 8, 12)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_a_direction_stays_put_and_the_gradient_alone_does_not_do_it(name: str) -> None:
    held, free = [], []
    for putting_back in (True, False):
        module = make_module()
        space = ParameterSpace.from_module(module)
        anchor = space.read(module)
        row = orthonormalise(torch.randn(1, space.size, generator=torch.Generator().manual_seed(1)))
        hold = Hold(space, anchor, rows=row)
        if not putting_back:
            hold.put_back = lambda theta: theta  # type: ignore[method-assign]
        options = {"weight_decay": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
        optimiser = getattr(torch.optim, name)(module.parameters(), lr=0.02, **options)
        for step in range(1, 31):
            optimiser.zero_grad()
            batch_loss(module, step).backward()
            optimiser.step()
            hold(step, module, optimiser)
        drift = abs(float(row[0].double() @ (space.read(module) - anchor).double()))
        (held if putting_back else free).append((drift, hold.held))
    assert held[0][0] <= 1e-6 * 5
    assert held[0][1] is True
    assert free[0][0] > 1e-3
    assert free[0][1] is False


def test_holding_a_direction_throws_no_idle_parameter_away() -> None:
    """A parameter without a gradient stays where it is under Adam, whatever direction is held."""
    module = nn.Linear(4, 1)
    module.register_parameter("idle", nn.Parameter(torch.ones(3)))
    space = ParameterSpace.from_module(module)
    row = orthonormalise(torch.randn(1, space.size, generator=torch.Generator().manual_seed(3)))
    hold = Hold(space, space.read(module), rows=row)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(4))
    for step in range(1, 31):
        optimiser.zero_grad()
        (module(x) - x.sum(1, keepdim=True) + 0 * module.idle.sum()).square().mean().backward()
        optimiser.step()
        hold(step, module, optimiser)
    # Only what holding the direction moves it by, a small part of one step each time.
    assert float((module.idle - 1).abs().max()) < 0.3
    assert hold.held


def test_masked_coordinates_do_not_move_at_all(recorded) -> None:
    folder, space = recorded
    start = blocking.open_branch_point(folder, space, 4)
    mask = space.mask(["0.*"])
    hold = Hold(space, start.theta, mask=mask)
    module = make_module()
    blocking.run_arm(
        module, Retraining(space, batch_loss, SETTINGS, unmeasured), start, 12, arm="block", hold=hold
    )
    after = space.read(module)
    assert torch.equal(after[mask], start.theta[mask])
    assert not torch.equal(after[~mask], start.theta[~mask])
    assert hold.held


def test_a_run_without_state_is_refused(tmp_path: Path) -> None:
    module = make_module()
    with pytest.raises(ValueError, match="needs optimiser state"):
        blocking.open_branch_point(SeriesFolder(tmp_path), ParameterSpace.from_module(module), 3)
    with pytest.raises(ValueError, match="rows or a mask"):
        Hold(ParameterSpace.from_module(module), torch.zeros(1))


def test_delay_and_gap_beyond_shams() -> None:
    steps = tuple(range(0, 101, 10))
    fall = np.linspace(1.0, 0.0, 11)
    late = np.concatenate([np.ones(3), fall[:8]])

    def curve(arm: str, values: np.ndarray) -> Curve:
        return Curve(arm, 0, steps, {"target": values, "other": fall}, True)

    free = [curve("none", fall)] * 5
    blocked = [curve("block", late)] * 5
    shams = [[curve("sham", fall)]] * 5
    found = blocking.compare_arms(free, blocked, shams, "target", ["other"], margin=0.01)
    assert found.delay.estimate == pytest.approx(0.3)
    assert found.gap.estimate == pytest.approx(0.3)
    assert found.others_equivalent
    assert not found.within_margin
    assert blocking.delay(curve("block", np.ones(11)), free[0], "target") == (50.0, True)


def test_branch_skip_puts_a_window_back_and_trains_on(recorded) -> None:
    """O3c: at t2 the coordinate is that of t1, all else is that of t2, and the optimiser goes on."""
    from interventions import edits

    folder, space = recorded
    start = blocking.open_branch_point(folder, space, 8)
    earlier = space.flatten(read_weights(folder.weights(4)))
    row = orthonormalise(torch.randn(1, space.size, generator=torch.Generator().manual_seed(2)))
    edit = edits.rollback(edits.Movement(start.theta, earlier), row, rewind=True)
    skipped = blocking.edited(start, edit)
    assert skipped.step == start.step == 8
    assert skipped.optimiser_state is start.optimiser_state
    torch.testing.assert_close(row @ skipped.theta, row @ earlier)
    change = skipped.theta - start.theta
    torch.testing.assert_close(change - row.T @ (row @ change), torch.zeros_like(change), atol=1e-6, rtol=0)
    assert float(change.norm()) == pytest.approx(float((row @ (start.theta - earlier)).abs()), rel=1e-4)

    def ended(point) -> torch.Tensor:
        module = make_module()
        blocking.run_arm(module, Retraining(space, batch_loss, SETTINGS, unmeasured, 4), point, 12, arm="x")
        return space.read(module)

    last = space.flatten(read_weights(folder.weights(12)))
    assert torch.equal(ended(blocking.edited(start, edit.scaled(0.0))), last)
    assert not torch.equal(ended(skipped), last)
