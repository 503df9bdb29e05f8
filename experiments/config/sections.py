"""Sections of a config: every key with its type, bounds and meaning; unknown keys are refused.

The reference of keys in the documentation is made from these models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

#: Types of keys that take a number and nothing else but nothing.
NUMBERS: tuple[Any, ...] = (int, float, int | None, float | None)
Momentum = Annotated[float, Field(ge=0, lt=1)]
Dose = Annotated[float, Field(ge=-100, le=100)]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """``true`` is no 1."""
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and field.annotation in NUMBERS:
            raise ValueError(f"must be a number, got {str(value).lower()}; write digits")
        return value


class ModelConfig(Section):
    """Shape of a small model, or the folder of a Hugging Face model."""

    kind: Literal["plain", "bridge", "huggingface"] = Field(
        "plain", description="our own transformer, the same in TransformerLens, or a Hugging Face folder"
    )
    layers: int = Field(2, ge=1, le=1000, description="transformer blocks")
    d_model: int = Field(128, ge=1, le=10**5, description="width of the residual stream")
    heads: int = Field(4, ge=1, le=10**4, description="attention heads; d_model is a multiple of them")
    d_mlp: int = Field(512, ge=1, le=10**6, description="width of the hidden layer of each block")
    init_std: float | None = Field(
        None, gt=0, le=9, description="of initial matrices; default .8/sqrt(d_model)"
    )
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

    select_sums: int = Field(250, ge=10, description="sums on which everything is chosen")
    curvature_sums: int = Field(250, ge=10, description="sums of which the Hessian is taken")
    evaluate_sums: int = Field(250, ge=10, description="sums that are opened once a plan is written")


class TextConfig(Section):
    """A user's text: plain text or jsonl(.gz) with a ``text`` field."""

    file: str | None = Field(None, description="path of the text; --text sets it")
    vocabulary: int = Field(2000, ge=260, le=10**6, description="byte-level BPE vocabulary")
    n_ctx: int = Field(64, ge=8, le=10**6, description="tokens of a sequence")
    scored_per_sequence: int = Field(8, ge=1, description="scored positions of each sequence")
    select_sequences: int = Field(128, ge=4, description="sequences on which everything is chosen")
    curvature_sequences: int = Field(128, ge=4, description="sequences of which the Hessian is taken")
    evaluate_sequences: int = Field(128, ge=4, description="sequences opened once a plan is written")
    max_documents: int | None = Field(None, ge=1, description="read at most this many documents")
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

    steps: int = Field(900, ge=2, le=10**8, description="optimiser steps")
    batch_size: int = Field(64, ge=1, le=10**7, description="sequences a step")
    learning_rate: float = Field(2e-4, gt=0, le=100, description="peak, of AdamW")
    weight_decay: float = Field(0.1, ge=0, le=100, description="of AdamW, decoupled")
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.95), description="momenta of AdamW, from 0 to below 1")
    warmup: int = Field(100, ge=0, le=10**8, description="steps over which the rate rises from 0")
    decay: Literal["constant", "cosine"] = Field("constant", description="of the rate after warm-up")
    record_every: int = Field(
        15, ge=1, description="optimiser steps between recorded weights, or candidates of 'adaptive'"
    )
    record: Literal["equal", "adaptive"] = Field(
        "equal",
        description="weights after every record_every steps, or record_count of them, chosen in training "
        "where the losses of a few curvature sequences move",
    )
    record_count: int | None = Field(
        None, ge=3, le=10**6, description="weights kept by 'adaptive'; default a quarter of the candidates"
    )
    state_every: int = Field(150, ge=1, description="optimiser steps between recorded optimiser states")

    @model_validator(mode="after")
    def _enough(self) -> TrainingConfig:
        if self.steps // self.record_every < 2:
            raise ValueError(
                f"a run needs at least 3 checkpoints, {self.steps} steps recorded every {self.record_every} "
                "give fewer; lower record_every"
            )
        if self.record == "equal" and self.record_count is not None:
            raise ValueError(
                f"record_count is of adaptive recording, got {self.record_count} with equal spacing; set "
                "record to adaptive, or leave record_count out"
            )
        if self.record_count is not None and self.record_count > len(self.candidates):
            raise ValueError(
                f"record_count must be at most the {len(self.candidates)} candidates, got "
                f"{self.record_count}; lower it, or lower record_every"
            )
        return self

    @property
    def candidates(self) -> list[int]:
        """Every ``record_every``-th step, 0 and the last included."""
        return sorted({*range(0, self.steps + 1, self.record_every), self.steps})

    @property
    def kept(self) -> int:
        """How many weights are left when training is done."""
        candidates = len(self.candidates)
        return candidates if self.record == "equal" else self.record_count or max(3, candidates // 4)

    @property
    def recorded(self) -> list[int]:
        """Steps at which weights are kept, 0 and the last included.

        With ``adaptive`` they are known after training alone; equally many, equally spaced candidates stand
        for them, to count and to plan with.
        """
        last = len(self.candidates) - 1
        return [self.candidates[round(i * last / (self.kept - 1))] for i in range(self.kept)]


class CheckpointsConfig(Section):
    """Checkpoints that exist already, instead of training."""

    directory: str = Field(description="folder of checkpoints")
    pattern: str = Field("*", description="shell pattern of their names")
    step_pattern: str | None = Field(None, description="regular expression whose first group is the step")
    reference: str | None = Field(None, description="folder of the pretrained model, becomes step 0")
    skip_damaged: bool = Field(False, description="leave incomplete checkpoints out instead of refusing")


#: Kinds of :data:`polca_edit.basis.build.KINDS`, which is not imported for a config to be read.
BasisKind = Literal[
    "hessian",
    "shuffled_hessian",
    "adaptive_hessian",
    "final_hessian",
    "sliding_hessian",
    "adam_hessian",
    "gauss_newton",
    "fisher",
    "gradient_covariance",
    "stacked_jacobian",
    "loss_path",
    "trajectory",
    "trajectory_hessian",
    "trajectory_secant",
    "loss_weighted",
    "parameter_axes",
    "random",
]
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

    kind: BasisKind = Field("hessian", description="how its directions are found")
    name: str | None = Field(None, description="in files and tables; default the kind and the rotation")
    vectors: int = Field(12, ge=1, le=10**5, description="K")
    per_checkpoint: int = Field(1, ge=1, le=10**4, description="k of Algorithm 1")
    tolerance: float = Field(1e-2, gt=0, le=1, description="relative residual of an eigenpair")
    max_products: int = Field(40, ge=1, le=10**6, description="Hessian-vector products a basis checkpoint")
    include: tuple[str, ...] = Field(("*",), description="shell patterns of the parameters it may lie in")
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

    min_cluster_share: float = Field(0.03, gt=0, lt=1, description="smallest cluster")
    min_samples_share: float = Field(1 / 15, gt=0, lt=1, description="neighbours that make a token dense")
    scaled: bool = Field(False, description="trajectories scaled to one size first")
    drop_rising_tokens: bool = Field(True, description="leave out tokens whose projected loss rises")
    drop_rising_vectors: bool = Field(True, description="leave out vectors whose mean projected loss rises")
    by_output: bool = Field(False, description="cluster the tokens of each output apart")
    selection: Literal["eom", "leaf"] = Field("eom", description="HDBSCAN's choice of clusters")


class DamageConfig(Section):
    """Exploratory damage."""

    reference: int = Field(0, ge=0, description="index of the reference checkpoint")
    doses: tuple[Dose, ...] = Field(
        (-0.5, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0), description="parts of a movement that are undone, besides 1"
    )
    random_draws: int = Field(8, ge=0, le=10**5, description="matched-norm random directions per vector")


class DiscoverConfig(Section):
    """Discovery by intervention: partial undo edits and windows of training."""

    edits: int = Field(160, ge=0, le=10**6, description="partial undo edits a basis; 0 leaves discovery out")
    windows: int = Field(10, ge=3, le=10**4, description="equal pieces into which training is cut")
