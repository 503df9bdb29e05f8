"""Keys of stages: hashes of the settings, contents and earlier stages that a result depends on.

No path enters a key. What lies behind the paths of a config does (:mod:`experiments.run.contents`),
so a text or a checkpoint folder that changed in place makes its stages run again, and one that was
moved does not.
"""

from __future__ import annotations

from typing import Any

from experiments.config import BasisConfig, RunConfig
from experiments.tasks import own_task
from polca_edit.artifacts import key_of

#: Raised when stage bodies change so that results of earlier code no longer stand.
SCHEMA = 2
#: Settings that are paths; their contents stand for them.
PATHS = {
    "model": ("path",),
    "text": ("file", "probe"),
    "checkpoints": ("directory", "reference"),
}


def stage_names(config: RunConfig) -> list[str]:
    """Stages of a run, in order; rotated bases come from the projections of the others."""
    labels = [basis.label for basis in config.bases]
    return [
        *([] if config.checkpoints is not None else ["train"]),
        *(f"basis:{basis.label}" for basis in config.measured_bases()),
        "projections",
        *(f"basis:{basis.label}" for basis in config.bases if basis.rotated),
        *(f"clusters:{label}" for label in labels),
        *(f"damage:{label}" for label in labels),
        *(f"signatures:{name}" for name in signature_names(config)),
        *(["timeline"] if config.discover.edits else []),
        "evaluate",
    ]


def signature_names(config: RunConfig) -> list[str]:
    """Bases whose movement is undone for interventional clusters: each alone, and all of them together."""
    if not config.discover.edits:
        return []
    measured = [basis.label for basis in config.measured_bases()]
    return [*measured, "+".join(measured)] if len(measured) > 1 else measured


def data_key(config: RunConfig, contents: str) -> str:
    """Hash of what decides a run's weights and its splits."""
    settings, own = config.model_dump(mode="json"), own_task(config.task)
    sections: dict[str, Any] = {}
    for name in ("task", "seed", "model", config.task, "training", "checkpoints"):
        value = settings.get(name)
        if isinstance(value, dict):
            value = {key: part for key, part in value.items() if key not in PATHS.get(name, ())}
        sections[name] = value
    if own is not None:
        sections.pop(config.task, None)
        sections["task"] = own.function
    # Only where they are given: keys of runs without them stay as they are.
    if config.options:
        sections["options"] = settings["options"]
    return key_of(SCHEMA, sections, contents)


def basis_key(config: RunConfig, contents: str, spec: BasisConfig) -> str:
    """Hash of what decides a basis; a rotated one stands on the projections of the measured ones."""
    own = spec.model_dump(mode="json", exclude={"name"})
    if spec.rotated:
        return key_of("basis", own, stage_key(config, contents, "projections"))
    return key_of("basis", own, data_key(config, contents))


def stage_key(config: RunConfig, contents: str, stage: str) -> str:
    """Hash of everything a stage's result depends on.

    Args:
        config: the run's.
        contents: of the files it names.
        stage: one of :func:`stage_names`.
    """
    kind, _, label = stage.partition(":")
    settings = config.model_dump(mode="json")

    def upstream(name: str) -> str:
        return stage_key(config, contents, name)

    def spec(wanted: str) -> BasisConfig:
        return next(basis for basis in config.bases if basis.label == wanted)

    if kind == "train":
        return key_of("train", data_key(config, contents))
    if kind == "basis":
        return basis_key(config, contents, spec(label))
    if kind == "projections":
        measured = [(b.label, basis_key(config, contents, b)) for b in config.measured_bases()]
        return key_of("projections", measured, settings["rule"] == "second_order")
    if kind == "clusters":
        source = f"basis:{label}" if spec(label).rotated else "projections"
        own = [settings[name] for name in ("rule", "clusters", "breakthrough_delta")]
        return key_of("clusters", label, upstream(source), own)
    if kind == "damage":
        return key_of("damage", upstream(f"clusters:{label}"), settings["damage"])
    if kind == "signatures":
        bases = [(name, basis_key(config, contents, spec(name))) for name in label.split("+")]
        own = [settings["discover"], settings["damage"]["reference"]]
        return key_of("signatures", bases, data_key(config, contents), own)
    if kind == "timeline":
        found = [upstream(f"signatures:{name}") for name in signature_names(config)]
        return key_of("timeline", found, settings["discover"])
    every = [upstream(f"clusters:{basis.label}") for basis in config.bases]
    return key_of("evaluate", every, settings["damage"])
