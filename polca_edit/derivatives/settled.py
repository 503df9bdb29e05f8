"""What a loss must be before it is differentiated: the same number twice, of evaluation mode, per token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from polca_edit.tokens import TokenLossFunction

#: Endings of config attributes and module attributes that hold a dropout probability.
_DROPOUTS = ("dropout", "dropout_p", "dropout_prob", "pdrop")


def unsettled_part(module: nn.Module) -> str | None:
    """The first part of a module that is random or uses batch statistics as it stands, None where none does.

    >>> unsettled_part(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    "dropout '1'"
    >>> unsettled_part(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).eval())
    """
    for path, part in module.named_modules():
        if not part.training:
            continue
        if isinstance(part, _DropoutNd) and part.p > 0:
            return f"dropout '{path}'"
        if isinstance(part, _BatchNorm) and part.track_running_stats:
            return f"batch statistics '{path}'"
        held = vars(part)
        for name in held:
            value = held[name]
            if name.endswith(_DROPOUTS) and isinstance(value, float) and value > 0:
                return f"{name} {value:g} of '{path or type(part).__name__}'"
    return None


def require_settled(module: nn.Module, token_loss: TokenLossFunction, inputs: Tensor | None) -> None:
    """Nothing where the loss is a function of weights and inputs alone.

    Args:
        module: the model.
        token_loss: its loss.
        inputs: a sequence or two, on which it is called twice; None looks at the module alone.

    Raises:
        ValueError: for a module in training mode whose loss depends on that, or a loss that is random.
    """
    part = unsettled_part(module)
    if part is not None:
        raise ValueError(
            f"a model must be in evaluation mode, this one is in training mode with {part}; call model.eval()"
        )
    if inputs is None:
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        once, again = token_loss(module, inputs), token_loss(module, inputs)
    if once.shape == again.shape and not torch.equal(once.nan_to_num(), again.nan_to_num()):
        apart = float((once - again).abs().max())
        # Kernels on a GPU may add in another order each time.
        if not apart <= 1e-5 * float(once.abs().max().clamp_min(1.0)):
            raise ValueError(
                f"a loss must be the same twice at the same weights, two calls differ by {apart:.3g} nats; "
                "switch off what is random in it (functional dropout needs training=self.training)"
            )


def require_slots(losses: Tensor, inputs: Tensor) -> Tensor:
    """The losses themselves where they are (B, P).

    Raises:
        ValueError: for any other shape, a mean among them.
    """
    if losses.ndim != 2 or losses.shape[0] != inputs.shape[0]:
        remedy = "return loss[:, None] for one prediction a sequence, and reduction='none', never a mean"
        raise ValueError(
            f"a token loss must return (B, P), one loss in nats per sequence and prediction slot, got "
            f"{tuple(losses.shape)} for {inputs.shape[0]} sequences; {remedy}"
        )
    return losses
