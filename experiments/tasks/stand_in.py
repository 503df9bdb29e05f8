"""A small model of the same kind, drawn, that stands in for a large one while a run is planned.

A plan must not need the memory of the run it is for. Layers are left out, and the vocabulary is cut by the
same share, so that layers and logits keep their proportion; very wide models are made narrower. What is
measured on it is then scaled: work on weights by their number, work on sequences by multiplications.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.config import RunConfig
from polca_edit.checkpoints.files import stored_header
from polca_edit.checkpoints.huggingface import is_adapter
from polca_edit.checkpoints.survey import survey, whole_revisions
from polca_edit.derivatives.heads import output_layer
from polca_edit.parameters import ParameterSpace

#: Parameters from which on a plan measures a smaller model: about twelve vectors of them are held.
LARGE_FOR_A_PLAN = 30_000_000
#: Layers and largest width of the stand-in.
LAYERS, WIDTH = 2, 512


@dataclass(frozen=True)
class StandIn:
    """A small model and the one it stands in for.

    Attributes:
        module: drawn, of the same class.
        whole: the model itself without weights (device ``meta``).
        space: its parameters.
    """

    module: nn.Module
    whole: nn.Module
    space: ParameterSpace

    @property
    def weights(self) -> float:
        """Parameters of the whole model over those of the stand-in."""
        return self.space.size / ParameterSpace.from_module(self.module).size

    def work(self, positions: int, slots: int) -> float:
        """Multiplications a sequence, the whole model's over the stand-in's.

        Args:
            positions: of a sequence.
            slots: of them that have logits.
        """
        whole, small = _body_and_head(self.whole), _body_and_head(self.module)
        return (whole[0] * positions + whole[1] * slots) / (small[0] * positions + small[1] * slots)

    @property
    def activations(self) -> float:
        """Numbers held a sequence, the whole model's over the stand-in's: layers times width."""
        wider = _config(self.whole).hidden_size / _config(self.module).hidden_size
        return float(self.layers * wider)

    @property
    def layers(self) -> float:
        """Layers of the whole model over those of the stand-in."""
        return float(_config(self.whole).num_hidden_layers / _config(self.module).num_hidden_layers)


def _config(module: nn.Module) -> Any:
    return module.config


def _body_and_head(module: nn.Module) -> tuple[int, int]:
    """Weights that every position is multiplied with, and those that scored ones alone are."""
    head, tables = output_layer(module), set()
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            tables.add(id(part.weight))
    own = 0 if head is None else sum(p.numel() for p in head.parameters())
    named = set() if head is None else {id(p) for p in head.parameters()}
    body = sum(p.numel() for p in module.parameters() if id(p) not in named and id(p) not in tables)
    return body, own


def stored_parameters(folder: Path) -> int:
    """Numbers in a model folder's weight files, from their headers."""
    return sum(math.prod(shape) for _, shape in stored_header(folder).values())


def stand_in_of(config: RunConfig) -> StandIn | None:
    """The stand-in for a config's Hugging Face model; None for adapters, bridges and small models."""
    if config.model.hooks or config.model.path is None:
        return None
    given = config.checkpoints
    if given is not None:
        found = survey(given.directory, names=given.pattern, step_pattern=given.step_pattern)
        if is_adapter(whole_revisions(found.revisions, skip_damaged=given.skip_damaged)[-1].path):
            return None
    return stand_in_for(Path(config.model.path))


def stand_in_for(folder: Path) -> StandIn | None:
    """The stand-in for the model in a folder, None where it is small, or of a kind that cannot be cut."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").exists() or stored_parameters(folder) < LARGE_FOR_A_PLAN:
        return None
    config = AutoConfig.from_pretrained(folder)
    try:
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        module = AutoModelForCausalLM.from_config(smaller(config), attn_implementation="eager")
        found = StandIn(module.float().eval(), whole, ParameterSpace.from_module(whole))
        module.config.use_cache = False
        usable = found.weights >= 1 and found.layers >= 1
    except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError, AssertionError):
        return None
    return found if usable else None


def smaller(config: Any) -> Any:
    """A transformers config with fewer layers, as few words in proportion, and at most :data:`WIDTH` wide."""
    result = copy.deepcopy(config)
    depth, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    layers = min(LAYERS, depth)
    share = layers / depth
    for name, value in list(vars(result).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(result, name, value[:layers])
    result.num_hidden_layers = layers
    own = getattr(config, "head_dim", None) or width // heads
    grouped = getattr(config, "num_key_value_heads", None)
    if width > WIDTH and (grouped is None or grouped == heads) and WIDTH % own == 0:
        result.hidden_size, result.num_attention_heads = WIDTH, WIDTH // own
        if grouped is not None:
            result.num_key_value_heads = WIDTH // own
        if getattr(config, "intermediate_size", None):
            result.intermediate_size = config.intermediate_size * WIDTH // width
        share *= WIDTH / width
    result.vocab_size = max(256, round(config.vocab_size * share))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(result, name, None), int):
            setattr(result, name, 0)
    return result
