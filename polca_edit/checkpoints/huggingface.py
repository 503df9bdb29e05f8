"""What files of Hugging Face models hold: revisions on the hub, logs, adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polca_edit.parameters import ParameterSpace

#: The 154 revisions of every Pythia model (Biderman et al. 2023).
PYTHIA_STEPS = (0, *(2**i for i in range(10)), *range(1000, 144_000, 1000))


@dataclass(frozen=True)
class HubRevisions:
    """Revisions of one repository on the hub, each downloaded when it is first read.

    Attributes:
        repository: for example ``EleutherAI/pythia-14m``.
        revisions: revision name -> step, for Pythia ``{f"step{s}": s for s in PYTHIA_STEPS}``.
        cache: hub cache; default the user's.
        offline: use only what the cache holds.
    """

    repository: str
    revisions: Mapping[str, int]
    cache: Path | str | None = None
    offline: bool = False

    def fetch(self, name: str) -> Path:
        """Local folder of one revision.

        Raises:
            ValueError: if it cannot be fetched.
        """
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                self.repository,
                revision=name,
                cache_dir=self.cache,
                local_files_only=self.offline,
                allow_patterns=["*.safetensors", "*.bin", "*.index.json", "config.json"],
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"revision '{name}' of '{self.repository}' cannot be fetched ({type(error).__name__}); "
                "check the name and the network, or download it beforehand"
            ) from error
        return Path(folder)


def logged_rates(folder: Path) -> dict[int, float]:
    """Optimiser step -> learning rate as the Trainer logged them, empty where there is no log."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
        rows = [row for row in state["log_history"] if "learning_rate" in row]
        return {int(row["step"]): float(row["learning_rate"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return {}


# -- adapters ---------------------------------------------------------------------------------------

#: Initialisations of LoRA that leave the pretrained weights alone and start with B at zero.
PLAIN_STARTS = (True, None, "gaussian", "kaiming")
#: Those that move part of the pretrained weights into A and B, the same way each time.
SPLIT_STARTS = ("pissa", "olora")


def adapter_settings(folder: Path | str) -> dict[str, Any]:
    """What ``adapter_config.json`` says.

    Raises:
        ValueError: if it is missing or no JSON object.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"an adapter folder must hold a readable adapter_config.json, '{folder}' does not ({error})"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"'{path}' must be a JSON object, got {type(values).__name__}; save it again")
    return values


def adapter_reference(
    space: ParameterSpace, theta: Float[Tensor, " N"], start: AdapterStart | None = None
) -> Float[Tensor, " N"]:
    """Adapter weights at which the model is the pretrained one.

    Plain LoRA starts with every B matrix zero; its A matrices are taken from ``theta``, because their values
    do not matter while B is zero. PiSSA and OLoRA move a part of the pretrained weights into A and B: they
    start where a new adapter of the same settings does, and so do magnitudes (DoRA) and saved modules.

    Args:
        space: the adapter's parameters.
        theta: its first recorded weights.
        start: a new adapter of the same settings; None where the model was not built from the base.

    Raises:
        ValueError: if the space holds parameters whose start is not known.
    """
    if start is not None and start.scheme in SPLIT_STARTS:
        return start.theta.clone()
    if start is not None and start.scheme not in PLAIN_STARTS:
        raise ValueError(
            f"the start of an adapter must be known, init_lora_weights '{start.scheme}' draws it anew each "
            "time; save it converted to plain LoRA, or record step 0"
        )
    parts = space.unflatten(theta.clone())
    odd = [name for name in space.names if "lora_" not in name or "magnitude" in name]
    if odd and start is None:
        raise ValueError(f"the reference of an adapter is known for LoRA only, got '{odd[0]}'; record step 0")
    first = {} if start is None else space.unflatten(start.theta)
    for name in parts:
        if name in odd:
            parts[name] = first[name]
        elif "lora_B" in name or "lora_embedding_B" in name:
            parts[name] = torch.zeros_like(parts[name])
    return space.flatten(parts)


@dataclass(frozen=True, eq=False)
class AdapterStart:
    """Where an adapter's training began.

    Attributes:
        base: folder of the pretrained model.
        theta: (N,) parameters of a new adapter of the same settings.
        scheme: ``init_lora_weights`` of the settings.
    """

    base: Path
    theta: Float[Tensor, " N"]
    scheme: object


def is_adapter(folder: Path | str) -> bool:
    """Whether a checkpoint folder holds an adapter instead of a model."""
    return (Path(folder) / "adapter_config.json").exists()


def base_of_adapter(folder: Path | str) -> str | None:
    """The pretrained model an adapter names, if it is a local folder."""
    named = adapter_settings(folder).get("base_model_name_or_path")
    return named if isinstance(named, str) and named and Path(named).is_dir() else None
