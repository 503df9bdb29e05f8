"""What files of Hugging Face models hold: revisions on the hub, spellings of names, logs, adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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


def spellings(space: ParameterSpace) -> dict[str, str]:
    """Other names that files use for a parameter -> its slot name.

    Files of base models leave out the first component (``transformer.``, ``gpt_neox.``), adapter
    files leave out the adapter's name (``.default``). A spelling that two slots share is dropped.
    """
    table: dict[str, str | None] = {}
    for slot, _ in space.aliases:
        for other in {slot.partition(".")[2], slot.replace(".default.", "."), slot.replace(".default", "")}:
            if other and other != slot:
                table[other] = None if other in table and table[other] != slot else slot
    slots = {slot for slot, _ in space.aliases}
    return {other: slot for other, slot in table.items() if slot is not None and other not in slots}


def logged_rates(folder: Path) -> dict[int, float]:
    """Optimiser step -> learning rate as the Trainer logged them, empty where there is no log."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
        rows = [row for row in state["log_history"] if "learning_rate" in row]
        return {int(row["step"]): float(row["learning_rate"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


# -- adapters ---------------------------------------------------------------------------------------


def adapter_reference(space: ParameterSpace, theta: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Adapter weights at which the model is the pretrained one: every LoRA B matrix is zero.

    The A matrices are taken from ``theta``, because their values do not matter while B is zero.

    Raises:
        ValueError: if the space holds parameters that are not LoRA matrices.
    """
    odd = [name for name in space.names if "lora_" not in name]
    if odd:
        raise ValueError(f"the reference of an adapter is known for LoRA only, got '{odd[0]}'; record step 0")
    parts = space.unflatten(theta.clone())
    for name in parts:
        if "lora_B" in name or "lora_embedding_B" in name:
            parts[name] = torch.zeros_like(parts[name])
    return space.flatten(parts)


def is_adapter(folder: Path | str) -> bool:
    """Whether a checkpoint folder holds an adapter instead of a model."""
    return (Path(folder) / "adapter_config.json").exists()


def base_of_adapter(folder: Path | str) -> str | None:
    """The pretrained model an adapter names, if it is a local folder."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    named = config.get("base_model_name_or_path")
    return named if named and Path(named).is_dir() else None
