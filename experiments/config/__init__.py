"""Run configuration: validated, frozen, unknown keys refused, saved resolved beside the results."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from experiments.config.sections import (
    ArithmeticConfig,
    BasisConfig,
    CheckpointsConfig,
    ClusterConfig,
    DamageConfig,
    DiscoverConfig,
    ModelConfig,
    Rotation,
    Section,
    TextConfig,
    TrainingConfig,
)
from experiments.tasks import own_task, resolved

__all__ = [
    "ArithmeticConfig",
    "BasisConfig",
    "CheckpointsConfig",
    "ClusterConfig",
    "DamageConfig",
    "DiscoverConfig",
    "ModelConfig",
    "Rotation",
    "RunConfig",
    "Section",
    "TextConfig",
    "TrainingConfig",
    "dump_config",
    "load_config",
    "parse_config",
    "parse_window",
    "preset_names",
]


class RunConfig(Section):
    """Everything a run depends on."""

    task: str = Field("arithmetic", description="a shipped task by name, or FILE.py:FUNCTION")
    options: dict[str, Any] = Field({}, description="given to the task's build, by name")
    seed: int = Field(0, ge=0, lt=2**32, description="of data, initial weights and every draw")
    device: str = Field("cpu", description="cpu or cuda")
    precision: Literal["float32", "float64"] = Field(
        "float32",
        description="of derivatives, bases, allocation and damage; training stays in the model's own, so the "
        "weights are the same. float64 takes twice the memory and about twice the time",
    )
    threads: int | None = Field(None, ge=1, le=4096, description="torch threads; default all cores")
    engine: Literal["local", "ray"] = Field("local", description="where derivative work runs")
    engine_address: str | None = Field(None, description="Ray head node; default RAY_ADDRESS or this machine")
    vector_block: int | None = Field(None, ge=1, description="directions per task; default all")
    token_shard: int | None = Field(
        None, ge=1, description="sequences per task, best a multiple of batch_size; default all"
    )
    parameter_block: int | None = Field(
        None,
        ge=1,
        description="weights per task, cut between tensors; a worker holds rows of its block; default all",
    )
    batch_size: int = Field(250, ge=1, le=10**7, description="sequences per derivative batch")
    basis_memory_gb: float = Field(
        4.0, ge=0, description="larger bases are built with their rows streamed from disk"
    )
    basis_storage: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="of stored basis rows; float32 keeps them as computed, the others halve the bytes, and "
        "their error (Gram matrix, slopes) is measured, printed and kept in the record",
    )
    slope_products: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the matrix products of slopes with basis vectors; bfloat16 is faster where the "
        "processor has units for it, and its error is measured at three checkpoints, printed and kept",
    )
    curvature_products: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the matrix products by which Hessian eigenvectors are sought; with bfloat16 every "
        "vector is then checked, and where needed finished, by products in full",
    )
    memory_gb: float | None = Field(
        None, gt=0, description="memory of the whole run; vectors, batches and directions are cut to fit"
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
    rule: Literal["first_order", "second_order", "trapezoid", "simpson"] = Field(
        "trapezoid",
        description="quadrature of the loss change over an interval; simpson also measures its middle, "
        "for twice the derivatives",
    )
    clusters: ClusterConfig = ClusterConfig()
    breakthrough_delta: int = Field(100, ge=1, le=10**8, description="steps of Eqs. 9 and 10")
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
        steps = self.training.candidates
        if self.window is not None and self.checkpoints is None and not set(self.window) <= set(steps):
            near = [min(steps, key=lambda step: abs(step - wanted)) for wanted in self.window]
            raise ValueError(
                f"window must start and end at recorded steps, {self.window[0]}:{self.window[1]} does not; "
                f"the nearest are {near[0]}:{near[1]}"
            )
        return self

    @model_validator(mode="after")
    def _recorded_enough(self) -> RunConfig:
        """Settings that count checkpoints, where the run records them itself."""
        if self.checkpoints is not None or own_task(self.task) is not None:
            return self
        first, last = self.window or (0, self.training.steps)
        count = sum(first <= step <= last for step in self.training.recorded)
        if self.damage.reference >= count - 1:
            raise ValueError(
                f"damage.reference must be below {count - 1}, the run's last checkpoint, got "
                f"{self.damage.reference}; use an earlier one"
            )
        for basis in self.bases:
            most = {"trajectory": count - 1, "hessian": count * basis.per_checkpoint}.get(basis.kind)
            # The default, which a stored config spells out, is cut to what there is.
            asked = basis.vectors != type(basis).model_fields["vectors"].default
            if most is not None and asked and basis.vectors > most:
                raise ValueError(
                    f"basis '{basis.label}' can have at most {most} vectors from {count} checkpoints, got "
                    f"{basis.vectors}; ask for fewer, or record more (training.record_every, record_count)"
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

    @property
    def itemsize(self) -> int:
        """Bytes of a number in vectors and tables."""
        return 8 if self.precision == "float64" else 4

    @property
    def sought_coarsely(self) -> bool:
        """Whether Hessian vectors are sought by products in fewer bits first."""
        return self.curvature_products != "float32"

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
        values = yaml.load(text, Loader=_Once) or {}
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = "" if mark is None else f"line {mark.line + 1}, "
        why = problem or str(error).splitlines()[0]
        raise ValueError(f"'{name}' must be valid YAML, it is not ({place}{why}); correct it") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"'{name}' must be a mapping of settings, got {type(values).__name__}; write KEY: VALUE lines"
        )
    for dotted, value in (overrides or {}).items():
        _assign(values, dotted, value)
    return parse_config(values, name)


class _Once(yaml.SafeLoader):
    """YAML in which a key stands once: of two values, one would be dropped without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' stands twice", key.start_mark
                )
            seen.add(str(key.value))
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def parse_config(values: dict[str, Any], name: str = "config") -> RunConfig:
    """Validate settings; the error names the key, the value and the rule.

    Raises:
        ValueError: as above, one sentence.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ValueError(
                f"'{name}': unknown key '{where}'; the config reference of the documentation lists the keys"
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        value = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
        own = first["type"] == "value_error"  # a sentence of ours, which ends with what to do
        remedy = "" if own else "; correct it, or leave it out for its default"
        if own and ", got " in message:
            value = ""
        raise ValueError(f"'{name}': {where}{': ' if where else ''}{message}{value}{remedy}") from None


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
