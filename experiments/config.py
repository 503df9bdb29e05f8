"""Run configuration: validated, frozen, unknown keys refused, saved resolved beside the results."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from experiments.tasks import resolved


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Section):
    """Shape of a small model, or the folder of a Hugging Face model."""

    kind: Literal["plain", "bridge", "huggingface"] = "plain"
    layers: int = Field(2, ge=1)
    d_model: int = Field(128, ge=1)
    heads: int = Field(4, ge=1)
    d_mlp: int = Field(512, ge=1)
    init_std: float | None = Field(None, gt=0, description="of initial matrices; default 0.8/sqrt(d_model)")
    path: str | None = Field(None, description="folder of a Hugging Face model (kind: huggingface)")
    hooks: bool = Field(False, description="wrap a Hugging Face model in a TransformerBridge")

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.d_model % self.heads:
            raise ValueError(f"d_model must be a multiple of heads, got {self.d_model} and {self.heads}")
        if self.kind == "huggingface" and not self.path:
            raise ValueError("kind 'huggingface' needs 'path', a local model folder")
        return self


class ArithmeticConfig(Section):
    """Sums in each split (four scored tokens a sum)."""

    select_sums: int = Field(250, ge=10)
    curvature_sums: int = Field(250, ge=10)
    evaluate_sums: int = Field(250, ge=10)


class TextConfig(Section):
    """A user's text: plain text or jsonl(.gz) with a ``text`` field."""

    file: str | None = Field(None, description="path of the text; --text sets it")
    vocabulary: int = Field(2000, ge=260, description="byte-level BPE vocabulary")
    n_ctx: int = Field(64, ge=8)
    scored_per_sequence: int = Field(8, ge=1, description="scored positions of each sequence")
    select_sequences: int = Field(128, ge=4)
    curvature_sequences: int = Field(128, ge=4)
    evaluate_sequences: int = Field(128, ge=4)
    max_documents: int | None = Field(None, description="read at most this many documents")
    field: str = Field("text", description="text field of JSON lines and data sets")
    separator: int | None = Field(
        None, ge=0, description="id between documents of a flat id array; default the tokenizer's end of text"
    )
    skip: int = Field(4, ge=0, description="first predictions of a sequence that are not scored")
    windows_per_document: int = Field(4, ge=1, description="sequences a document may lend to one split")
    deduplicate: bool = Field(True, description="leave out near-duplicate documents")
    probe: str | None = Field(
        None, description="CoNLL-U file; select and evaluate tokens come from it and carry gold tags"
    )


class TrainingConfig(Section):
    """Optimisation and recording."""

    steps: int = Field(900, ge=2)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int = Field(100, ge=0)
    decay: Literal["constant", "cosine"] = "constant"
    record_every: int = Field(15, ge=1, description="optimiser steps between recorded weights")
    state_every: int = Field(150, ge=1, description="optimiser steps between recorded optimiser states")

    @model_validator(mode="after")
    def _enough(self) -> TrainingConfig:
        if self.steps // self.record_every < 2:
            raise ValueError(
                f"a run needs at least 3 checkpoints, {self.steps} steps recorded every {self.record_every} "
                "give fewer; lower record_every"
            )
        return self

    @property
    def recorded(self) -> list[int]:
        """Steps at which weights are kept, 0 and the last included."""
        return sorted({*range(0, self.steps + 1, self.record_every), self.steps})


class CheckpointsConfig(Section):
    """Checkpoints that exist already, instead of training."""

    directory: str
    pattern: str = "*"
    step_pattern: str | None = Field(None, description="regular expression whose first group is the step")
    reference: str | None = Field(None, description="folder of the pretrained model, becomes step 0")
    skip_damaged: bool = Field(False, description="leave incomplete checkpoints out instead of refusing")


#: Rotations inside a span that need no label, and the one that does.
Rotation = Literal[
    "none",
    "varimax",
    "quartimax",
    "joint",
    "joint_centred",
    "joint_normalised",
    "fastica",
    "contrastive",
]


class BasisConfig(Section):
    """One basis; with a rotation, the span of the unrotated basis of the same kind turned."""

    kind: str = "hessian"
    name: str | None = None
    vectors: int = Field(12, ge=1)
    per_checkpoint: int = Field(1, ge=1, description="k of Algorithm 1")
    tolerance: float = Field(1e-2, gt=0)
    max_products: int = Field(40, ge=1)
    include: tuple[str, ...] = ("*",)
    steps: tuple[int, ...] | None = Field(None, description="basis checkpoints; default by placement")
    placement: Literal["equal", "loss_fall"] = Field(
        "equal", description="equal steps (paper), or equal shares of the mean loss's fall (no labels)"
    )
    rotation: Rotation = Field(
        "none", description="turn the unrotated basis of the same kind inside its span, fitted on select"
    )
    skill: str | None = Field(None, description="known skill of a contrastive rotation (supervised)")

    @model_validator(mode="after")
    def _skill_for_contrastive(self) -> BasisConfig:
        if (self.skill is not None) != (self.rotation == "contrastive"):
            raise ValueError("'skill' names the skill of a contrastive rotation, and only that; set both")
        return self

    @property
    def label(self) -> str:
        """Name of the basis in files and summaries."""
        return self.name or (self.kind if self.rotation == "none" else f"{self.kind}_{self.rotation}")

    @property
    def rotated(self) -> bool:
        """Whether it is another basis turned, and needs no pass of its own."""
        return self.rotation != "none"

    def span(self) -> dict[str, Any]:
        """Every setting that decides the span: all but name and rotation."""
        return self.model_dump(exclude={"name", "rotation", "skill"})


class ClusterConfig(Section):
    """HDBSCAN settings, sizes as shares of the token count."""

    min_cluster_share: float = Field(0.03, gt=0, lt=1)
    min_samples_share: float = Field(1 / 15, gt=0, lt=1)
    scaled: bool = False
    drop_rising_tokens: bool = True
    drop_rising_vectors: bool = True
    by_output: bool = False
    selection: Literal["eom", "leaf"] = "eom"


class DamageConfig(Section):
    """Exploratory damage."""

    reference: int = Field(0, ge=0, description="index of the reference checkpoint")
    doses: tuple[float, ...] = (-0.5, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    random_draws: int = Field(8, ge=0, description="matched-norm random directions per vector")


class DiscoverConfig(Section):
    """Discovery by intervention: partial undo edits and windows of training."""

    edits: int = Field(160, ge=0, description="partial undo edits a basis; 0 leaves discovery out")
    windows: int = Field(10, ge=3, description="equal pieces into which training is cut")


class RunConfig(Section):
    """Everything a run depends on."""

    task: str = Field("arithmetic", description="a shipped task by name, or FILE.py:FUNCTION")
    options: dict[str, Any] = Field({}, description="given to the task's build, by name")
    seed: int = Field(0, ge=0)
    device: str = "cpu"
    threads: int | None = Field(None, ge=1, description="torch threads; default all cores")
    engine: Literal["local", "ray"] = "local"
    engine_address: str | None = Field(None, description="Ray head node; default RAY_ADDRESS or this machine")
    vector_block: int | None = Field(None, ge=1, description="directions per task; default all")
    token_shard: int | None = Field(
        None, ge=1, description="sequences per task, best a multiple of batch_size; default all"
    )
    batch_size: int = Field(250, ge=1, description="sequences per derivative batch")
    basis_memory_gb: float = Field(
        4.0, ge=0, description="larger bases are built with their rows streamed from disk"
    )
    compiled: bool = Field(False, description="torch.compile the derivative graphs")
    model: ModelConfig = ModelConfig()
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    text: TextConfig = TextConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoints: CheckpointsConfig | None = None
    bases: tuple[BasisConfig, ...] = (BasisConfig(), BasisConfig(kind="trajectory"))
    window: tuple[int, int] | None = Field(
        None, description="first and last step of the training that is observed and undone; default all"
    )
    rule: Literal["first_order", "second_order", "trapezoid"] = "trapezoid"
    clusters: ClusterConfig = ClusterConfig()
    breakthrough_delta: int = Field(100, ge=1)
    damage: DamageConfig = DamageConfig()
    discover: DiscoverConfig = DiscoverConfig()

    @field_validator("window", mode="before")
    @classmethod
    def _window(cls, window: Any) -> Any:
        return parse_window(window) if isinstance(window, str) else window

    @field_validator("task")
    @classmethod
    def _known_task(cls, task: str) -> str:
        return resolved(task)

    @model_validator(mode="after")
    def _unique(self) -> RunConfig:
        labels = [basis.label for basis in self.bases]
        if len(set(labels)) != len(labels):
            raise ValueError(f"every basis needs its own name, got {labels}; set 'name'")
        return self

    @model_validator(mode="after")
    def _window_was_recorded(self) -> RunConfig:
        steps = self.training.recorded
        if self.window is not None and self.checkpoints is None and not set(self.window) <= set(steps):
            near = [min(steps, key=lambda step: abs(step - wanted)) for wanted in self.window]
            raise ValueError(
                f"window must start and end at recorded steps, {self.window[0]}:{self.window[1]} does not; "
                f"the nearest are {near[0]}:{near[1]}"
            )
        return self

    @model_validator(mode="after")
    def _rotated_from_a_measured_basis(self) -> RunConfig:
        """A rotated basis takes its span's settings from the unrotated one of its kind."""
        resolved = []
        for spec in self.bases:
            if not spec.rotated:
                resolved.append(spec)
                continue
            if self.rule == "second_order":
                raise ValueError(
                    f"basis '{spec.label}' is rotated, and rule 'second_order' needs curvatures that "
                    "rotations do not have; use rule 'trapezoid'"
                )
            asked = spec.model_dump(include=spec.model_fields_set - {"name", "rotation", "skill"})
            found = [
                b
                for b in self.bases
                if not b.rotated and b.kind == spec.kind and asked.items() <= b.model_dump().items()
            ]
            if not found:
                raise ValueError(
                    f"basis '{spec.label}' turns an unrotated basis '{spec.kind}' with the same settings, "
                    "none is there; add it to 'bases'"
                )
            own = {"name": spec.name, "rotation": spec.rotation, "skill": spec.skill}
            resolved.append(found[0].model_copy(update=own))
        # Frozen sections cannot be assigned to; validation is where they are made.
        object.__setattr__(self, "bases", tuple(resolved))
        return self

    def measured_bases(self) -> tuple[BasisConfig, ...]:
        """Bases that are projected; the others are turned from them."""
        return tuple(basis for basis in self.bases if not basis.rotated)

    def source_of(self, spec: BasisConfig) -> BasisConfig:
        """The measured basis whose span a rotated one turns."""
        return next(b for b in self.measured_bases() if b.span() == spec.span())


def parse_window(text: str | None) -> tuple[int, int] | None:
    """``S:E`` as two steps.

    >>> parse_window("600:720")
    (600, 720)

    Raises:
        ValueError: for anything else.
    """
    if text is None:
        return None
    start, colon, end = text.partition(":")
    if not (colon and start.strip().isdigit() and end.strip().isdigit()):
        raise ValueError(f"--window must be two steps START:END, got '{text}'; for example 600:720")
    if int(start) >= int(end):
        raise ValueError(f"--window must end after it starts, got '{text}'; swap the two steps")
    return int(start), int(end)


#: Other names of presets.
PRESET_ALIASES = {"english": "english-demo"}


def preset_names() -> list[str]:
    """Presets shipped with the package."""
    folder = resources.files("experiments") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_config(source: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a config file, or a preset by name, and apply dotted overrides.

    Raises:
        ValueError: for a missing file, invalid YAML, an unknown key or a value out of range.
    """
    name = str(source)
    if not Path(name).is_file():
        name = PRESET_ALIASES.get(name.removesuffix(".yaml"), name)
    if Path(name).is_file():
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"'{name}' must be a YAML file in UTF-8, it is not ({error})") from error
    elif name.removesuffix(".yaml") in preset_names():
        text = (resources.files("experiments") / "presets" / f"{name.removesuffix('.yaml')}.yaml").read_text()
    else:
        raise ValueError(f"a config must be a file or one of the presets {preset_names()}, got '{name}'")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"'{name}' must be valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"'{name}' must be a mapping of settings, got {type(values).__name__}")
    for dotted, value in (overrides or {}).items():
        _assign(values, dotted, value)
    return parse_config(values, name)


def parse_config(values: dict[str, Any], name: str = "config") -> RunConfig:
    """Validate settings; the error names the key, the value and the rule.

    Raises:
        ValueError: as above, one sentence.
    """
    try:
        return RunConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        if first["type"] == "extra_forbidden":
            raise ValueError(
                f"'{name}': unknown key '{where}'; see 'polca-edit run --help' for the known ones"
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        value = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
        raise ValueError(f"'{name}': {where}: {message}{value}") from None


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {dotted}: '{parent}' is not a section; check the key")
    values[last] = value


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
