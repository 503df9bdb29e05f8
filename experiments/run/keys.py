"""Keys of stages: hashes of the settings, contents and earlier stages that a result depends on.

No path enters a key. What lies behind the paths of a config does (:mod:`experiments.run.contents`),
so a text or a checkpoint folder that changed in place makes its stages run again, and one that was
moved does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.config import BasisConfig, RunConfig
from experiments.tasks import own_task
from polca_edit.artifacts import key_of

#: Raised when stage bodies change so that results of earlier code no longer stand.
SCHEMA = 2
Window = tuple[int, int] | None
#: Names of bases; None means all of a run's.
Labels = Sequence[str] | None
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
        *discovery_stages(config),
        "evaluate",
    ]


def discovery_stages(config: RunConfig, window: Window = None, labels: Labels = None) -> list[str]:
    """Stages of discovery, of the run's own movement or of a window's, which is kept beside it.

    Args:
        config: the run's.
        window: of training.
        labels: bases; others are neither built nor undone. Default all.
    """
    names = [f"signatures:{name}" for name in signature_names(config, window, labels)]
    return [*names, timeline_stage(config, window, labels)] if names else []


def timeline_stage(config: RunConfig, window: Window = None, labels: Labels = None) -> str:
    """Stage of the timeline; one that stands on some of the bases names them."""
    chosen = measured_labels(config, labels)
    some = "" if chosen == measured_labels(config) else f":{'+'.join(chosen)}"
    return f"timeline{some}{window_suffix(window)}"


def measured_labels(config: RunConfig, labels: Labels = None) -> list[str]:
    """Measured bases of a config that the given ones are or are turned from, in the config's order."""
    if labels is None:
        return [basis.label for basis in config.measured_bases()]
    wanted = {config.source_of(basis).label for basis in config.bases if basis.label in labels}
    return [basis.label for basis in config.measured_bases() if basis.label in wanted]


def window_suffix(window: Window) -> str:
    """How a window is written at the end of a stage's name; nothing for the run's own movement."""
    return "" if window is None else f"@{window[0]}-{window[1]}"


def window_of(name: str) -> tuple[str, Window]:
    """A name without its window, and the window.

    >>> window_of("hessian+trajectory@20-60"), window_of("timeline")
    (('hessian+trajectory', (20, 60)), ('timeline', None))
    """
    plain, at, ends = name.partition("@")
    start, _, end = ends.partition("-")
    return plain, (int(start), int(end)) if at else None


def signature_names(config: RunConfig, window: Window = None, labels: Labels = None) -> list[str]:
    """Bases whose movement is undone for interventional clusters: each alone, and all of them together."""
    if not config.discover.edits:
        return []
    measured = measured_labels(config, labels)
    names = [*measured, "+".join(measured)] if len(measured) > 1 else measured
    return [f"{name}{window_suffix(window)}" for name in names]


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
    if config.training.record == "equal":
        for name in ("record", "record_count"):
            del sections["training"][name]
    if config.options:
        sections["options"] = settings["options"]
    if config.window is not None:
        sections["window"] = settings["window"]
    if config.precision != "float32":
        sections["precision"] = config.precision
    return key_of(SCHEMA, sections, contents)


def basis_key(config: RunConfig, contents: str, spec: BasisConfig) -> str:
    """Hash of what decides a basis; a rotated one stands on the projections of the measured ones."""
    own = spec.model_dump(mode="json", exclude={"name"})
    if spec.rotated:
        return key_of("basis", own, stage_key(config, contents, "projections"))
    # Only where they differ: keys of bases of all weights, stored in full, stay as they are.
    more = ["entries alone"] if spec.include != ("*",) else []
    more += [config.basis_storage] if config.basis_storage != "float32" else []
    if config.sought_coarsely:
        more.append(f"sought in {config.curvature_products}")
    return key_of("basis", own, data_key(config, contents), *more)


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
        # Weights are trained alike in either precision.
        return key_of("train", data_key(config.model_copy(update={"precision": "float32"}), contents))
    if kind == "basis":
        return basis_key(config, contents, spec(label))
    if kind == "projections":
        measured = [(b.label, basis_key(config, contents, b)) for b in config.measured_bases()]
        # Only rules that measure more than the trapezoid: keys of runs without them stay as they are.
        more = ["simpson"] if settings["rule"] == "simpson" else []
        more += [config.slope_products] if config.slope_products != "float32" else []
        return key_of("projections", measured, settings["rule"] == "second_order", *more)
    if kind == "clusters":
        source = f"basis:{label}" if spec(label).rotated else "projections"
        own = [settings[name] for name in ("rule", "clusters", "breakthrough_delta")]
        return key_of("clusters", label, upstream(source), own)
    if kind == "damage":
        return key_of("damage", upstream(f"clusters:{label}"), settings["damage"])
    if kind == "signatures":
        names, window = window_of(label)
        bases = [(name, basis_key(config, contents, spec(name))) for name in names.split("+")]
        own = [settings["discover"], settings["damage"]["reference"], *([] if window is None else [window])]
        return key_of("signatures", bases, data_key(config, contents), own)
    if window_of(kind)[0] == "timeline":
        some, window = window_of(label or kind)
        needed = signature_names(config, window, some.split("+") if label else None)
        found = [upstream(f"signatures:{name}") for name in needed]
        return key_of("timeline", found, settings["discover"])
    every = [upstream(f"clusters:{basis.label}") for basis in config.bases]
    return key_of("evaluate", every, settings["damage"])
