"""Order, caching and resume of one run: train, bases, projections, clusters, damage, evaluation."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.config import BasisConfig, RunConfig, dump_config
from experiments.run.contents import Contents
from experiments.run.engines import slope_engine
from experiments.run.machine import hardware, peak_rss_bytes, versions
from experiments.run.parts import Ledger, kept_parts, kept_products, mapped_rows, part_path
from experiments.run.rotated import turned
from experiments.run.store import RunDirectory, StageRecord
from experiments.tasks.task import Task, build_task
from polca_edit.allocation.allocate import (
    CheckpointSlopes,
    Projections,
    assemble,
    second_order_terms,
)
from polca_edit.artifacts import checksum, key_of, load_record, save_record
from polca_edit.basis.record import (
    Basis,
    BasisCheckpoint,
    hessian_basis,
    random_basis,
    trajectory_basis,
)
from polca_edit.checkpoints.files import SeriesFolder, write_atomically, write_json
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.clusters.density import ClusterSettings, VectorClusters
from polca_edit.derivatives.objective import Objective
from polca_edit.observation import Observation, ObserveSettings, analyse
from polca_edit.training import SeriesWriter, TrainingSettings, train

Say = Callable[[str], None]
SCHEMA = 1
_COMMON = ("task", "seed", "model", "training", "checkpoints")


@dataclass(frozen=True)
class ClusterRecord:
    """Clusters of one basis on the select split.

    Attributes:
        labels: (K, M) cluster per vector and token, -1 outside every cluster.
        dropped: (K, M) tokens left out before clustering.
        kept: (K,) vectors that were clustered.
        tau: step after which the mean exact loss is flat.
        hidden: "vector:cluster" -> hidden breakthrough.
    """

    labels: Tensor
    dropped: Tensor
    kept: Tensor
    tau: int
    hidden: dict[str, bool]

    @classmethod
    def of(cls, observation: Observation) -> ClusterRecord:
        """From an observation."""
        found = observation.clusters
        return cls(
            torch.stack([c.labels for c in found]),
            torch.stack([c.dropped for c in found]),
            torch.tensor([c.kept for c in found]),
            observation.tau,
            {f"{v}:{c}": hidden for (v, c), hidden in observation.hidden.items()},
        )

    def vectors(self) -> list[VectorClusters]:
        """One record per vector."""
        return [
            VectorClusters(v, bool(self.kept[v]), self.labels[v], self.dropped[v])
            for v in range(len(self.labels))
        ]


@dataclass(frozen=True)
class Run:
    """An open run: where it is, what it is about, and the derivatives of its loss."""

    directory: RunDirectory
    config: RunConfig
    task: Task
    objective: Objective
    say: Say

    def key(self, stage: str) -> str:
        """Hash of everything a stage's result depends on."""
        c = self.config.model_dump(mode="json")
        measured = [_spec_key(basis) for basis in self.config.measured_bases()]
        common = {k: c[k] for k in ("task", "seed", "model", c["task"], "training", "checkpoints")}
        kind, _, name = stage.partition(":")
        own: Any = None
        # A rotated basis stands on the measured ones, and nothing but its own stages stands on it.
        spec = next((b for b in self.config.bases if b.label == name), None)
        bases = [*measured, _spec_key(spec)] if spec is not None and spec.rotated else measured
        if kind == "basis":
            own = bases if spec is not None and spec.rotated else next(b for b in bases if _label(b) == name)
        elif kind == "projections":
            own = measured, c["rule"] == "second_order"
        elif kind in ("clusters", "damage"):
            own = (
                bases,
                c["rule"],
                c["clusters"],
                c["breakthrough_delta"],
                c["damage"] if kind == "damage" else None,
            )
        elif kind == "evaluate":
            every = [_spec_key(basis) for basis in self.config.bases]
            own = every, c["rule"], c["clusters"], c["breakthrough_delta"], c["damage"]
        return key_of(SCHEMA, stage, common, own)

    def key_for(self, name: str, *depends: object) -> str:
        """Key of something that is no stage: of the run's weights and data, and what else it depends on."""
        common = {k: v for k, v in self.config.model_dump(mode="json").items() if k in _COMMON}
        own = common | {self.config.task: self.config.model_dump(mode="json")[self.config.task]}
        return key_of(SCHEMA, name, own, self.contents, depends)

    @cached_property
    def contents(self) -> str:
        """Hash of every file the config names."""
        return Contents().of_config(self.config)

    def settings(self) -> ObserveSettings:
        """Allocation and clustering settings."""
        return ObserveSettings(
            self.config.rule,
            ClusterSettings(**self.config.clusters.model_dump()),
            self.config.breakthrough_delta,
        )

    def checkpoints(self) -> Checkpoints:
        """The run's series (recorded or opened)."""
        given = self.task.given_checkpoints(self.config)
        if given is not None:
            return given.require()
        return open_checkpoints(self.directory.checkpoints, self.task.space).require()


def _spec_key(spec: BasisConfig) -> dict[str, Any]:
    """A basis section as it enters keys; sections without a rotation keep the keys they always had."""
    return spec.model_dump(mode="json", exclude=set() if spec.rotated else {"rotation", "skill"})


def _label(section: dict[str, Any]) -> str:
    return str(section["name"] or section["kind"])


def open_run(config: RunConfig, out: Path, say: Say = print) -> Run:
    """Prepare a run directory; the resolved config is written at once.

    Raises:
        ValueError: if ``out`` is not a directory this tool may write into.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "config.yaml").exists())):
        raise ValueError(f"'{out}' must be new, empty or an earlier run; choose another --out")
    task = build_task(config)
    directory = RunDirectory(out)
    write_atomically(out / "config.yaml", lambda part: part.write_text(dump_config(config)))
    return Run(directory, config, task, task.objective(config), say)


def load_run(out: Path, say: Say = print) -> Run:
    """Open an existing run with its own config.

    Raises:
        ValueError: if there is no run.
    """
    from experiments.config import load_config

    if not (out / "config.yaml").exists():
        raise ValueError(
            f"'{out}' must be a run directory with a config.yaml; give the --out of an earlier run"
        )
    config = load_config(out / "config.yaml")
    task = build_task(config)
    return Run(RunDirectory(out), config, task, task.objective(config), say)


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
        "evaluate",
    ]


def run_stages(run: Run, only: Sequence[str] | None = None) -> None:
    """Run every stage that is not finished, in order.

    Args:
        run: the run.
        only: stages to run again even if finished.
    """
    from experiments.run import damage as damage_stage

    bodies: dict[str, Callable[[Run, str], None]] = {
        "train": _train,
        "basis": _basis,
        "projections": _projections,
        "clusters": _clusters,
        "damage": damage_stage.run_damage,
        "evaluate": damage_stage.run_evaluate,
    }
    for stage in stage_names(run.config):
        started = time.perf_counter()
        key = run.key(stage)
        if only and stage in only:
            run.directory.stage_file(stage).unlink(missing_ok=True)
        if run.directory.finished(stage, key):
            run.say(f"  {stage:<24} done before, kept")
            continue
        bodies[stage.partition(":")[0]](run, stage)
        run.say(f"  {stage:<24} {time.perf_counter() - started:7.1f} s")
    write_run_record(run)


def write_run_record(run: Run) -> None:
    """run.json: versions, seeds, hardware, cost per stage; openings of the evaluate split are kept."""
    path = run.directory / "run.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    records = run.directory.stage_records()
    names = set(stage_names(run.config))
    write_json(
        path,
        {
            **old,
            "schema": SCHEMA,
            "seed": run.config.seed,
            "versions": versions(),
            "hardware": hardware(),
            "parameters": run.task.space.size,
            "select_sequences": run.task.splits.select.sequences,
            "stages": {r.stage: dataclasses.asdict(r) for r in records if r.stage in names},
        },
    )


# -- stages ---------------------------------------------------------------------------------------


def training_settings(config: RunConfig) -> TrainingSettings:
    """The optimisation settings of a config."""
    t = config.training
    return TrainingSettings(t.steps, t.learning_rate, t.weight_decay, t.betas, t.warmup, t.decay, config.seed)


def recorder_of(run: Run) -> SeriesWriter:
    """Where and when the run's weights are kept."""
    t = run.config.training
    return SeriesWriter(SeriesFolder(run.directory.checkpoints), run.task.space, t.recorded, t.state_every)


def _train(run: Run, stage: str) -> None:
    if run.task.batch_loss is None:
        raise ValueError(
            f"task '{run.task.name}' has no training data; set 'checkpoints' to open existing ones"
        )
    settings, recorder = training_settings(run.config), recorder_of(run)
    folder = run.directory.checkpoints
    key = run.key(stage)
    marker = folder / "key.json"
    if folder.exists() and (not marker.exists() or json.loads(marker.read_text())["key"] != key):
        shutil.rmtree(folder)
    write_json(marker, {"key": key})
    bar = tqdm(total=settings.steps, desc="training", unit="step", disable=None, leave=False)

    def progress(step: int, loss: float) -> None:
        bar.n = step
        if loss == loss:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update(0)

    run.directory.stage_file(stage).unlink(missing_ok=True)
    # The module is trained on a copy: the objective's own module keeps its initial weights.
    module = copy.deepcopy(run.task.module)
    started = time.perf_counter()
    train(
        module,
        run.task.batch_loss,
        settings,
        recorder=recorder,
        data_order=run.task.data_order,
        progress=progress,
    )
    bar.close()
    # Training may have been resumed; its cost in passes is that of all steps either way.
    work = float(settings.steps * run.config.training.batch_size)
    files = [p for p in sorted(folder.iterdir()) if p.suffix == ".safetensors"] + [folder / "series.json"]
    record = StageRecord(
        stage,
        key,
        time.perf_counter() - started,
        {"forward": work, "backward": work, "tangent": 0.0, "hvp": 0.0},
        peak_rss_bytes(),
        {str(p.relative_to(run.directory.path)): checksum(p) for p in files},
    )
    write_json(run.directory.stage_file(stage), dataclasses.asdict(record))


def basis_checkpoints(run: Run, checkpoints: Checkpoints, spec: BasisConfig) -> Checkpoints:
    """Where vectors are taken: the given steps, or spread as the config says, the last one included.

    Raises:
        ValueError: for steps that were not recorded, or more basis checkpoints than recorded ones.
    """
    if spec.steps is not None:
        missing = [s for s in spec.steps if s not in checkpoints.steps]
        if missing:
            raise ValueError(
                f"basis '{spec.label}' wants steps {missing[:5]} that were not recorded; record or drop them"
            )
        return checkpoints.subset([checkpoints.steps.index(s) for s in spec.steps])
    count = -(-spec.vectors // spec.per_checkpoint)
    if count > len(checkpoints) - 1:
        raise ValueError(
            f"basis '{spec.label}' wants {count} checkpoints, only {len(checkpoints) - 1} are recorded; "
            "lower vectors or raise per_checkpoint"
        )
    if spec.placement == "equal":
        return checkpoints.subset([round((i + 1) * (len(checkpoints) - 1) / count) for i in range(count)])
    sample = run.task.splits.curvature
    means = [
        float(run.objective.losses(checkpoints[i], sample).double().mean()) for i in range(len(checkpoints))
    ]
    return checkpoints.subset(equal_falls(means, count))


def equal_falls(means: Sequence[float], count: int) -> list[int]:
    """Indices of ``count`` checkpoints at equal shares of the mean loss's fall, the last one included.

    The fall is that of the running minimum; where it is steep, checkpoints lie close together.

    >>> equal_falls([4.0, 3.9, 1.0, 0.9, 0.8], 2)
    [2, 4]
    """
    lowest = torch.tensor(means, dtype=torch.float64).cummin(0).values
    fall = lowest[0] - lowest
    chosen: list[int] = []
    for number in range(count):
        wanted = fall[-1] * (number + 1) / count
        first = int((fall >= wanted - 1e-12).nonzero()[0, 0]) if number < count - 1 else len(means) - 1
        # Steep stretches may offer fewer checkpoints than wanted: go on to the next free one, but
        # leave enough for those still to come.
        previous = chosen[-1] if chosen else 0
        chosen.append(min(max(first, previous + 1), len(means) - (count - number)))
    return chosen


def _basis(run: Run, stage: str) -> None:
    spec = next(b for b in run.config.bases if b.label == stage.partition(":")[2])
    if spec.rotated:
        _rotated_basis(run, stage, spec)
        return
    path = run.directory.basis(spec.label)
    parts = run.directory.path / "basis" / f"{spec.label}.parts"
    checkpoints = run.checkpoints()
    with run.directory.stage(stage, run.key(stage), [path], run.objective.passes, parts=parts):
        save_record(path, build_basis(run, spec, checkpoints, parts))


def _rotated_basis(run: Run, stage: str, spec: BasisConfig) -> None:
    """Basis and projections at once, both turned from stored ones."""
    source = run.config.source_of(spec).label
    outputs = [run.directory.basis(spec.label), run.directory.projections(spec.label)]
    with run.directory.stage(stage, run.key(stage), outputs, run.objective.passes):
        basis, projections = turned(
            spec,
            load_record(Basis, run.directory.basis(source)),
            load_record(Projections, run.directory.projections(source)),
            run.task.splits.select,
            run.config.seed,
        )
        save_record(outputs[0], basis)
        save_record(outputs[1], projections)


def build_basis(run: Run, spec: BasisConfig, checkpoints: Checkpoints, parts: Path) -> Basis:
    """The basis a config section asks for."""
    mask = None if spec.include == ("*",) else run.task.space.mask(spec.include)
    generator = torch.Generator().manual_seed(run.config.seed)
    size = run.task.space.size
    if spec.kind == "random":
        return random_basis(size, spec.vectors, generator, mask=mask)
    if spec.kind == "trajectory":
        return trajectory_basis(checkpoints, spec.vectors, mask=mask)
    if spec.kind == "hessian":
        chosen = basis_checkpoints(run, checkpoints, spec)
        ledger = Ledger(parts, run.objective.passes)
        keep = kept_parts(parts, BasisCheckpoint, ledger)
        budget = round(run.config.basis_memory_gb * 1e9)
        large = spec.vectors * size * 4 > budget
        finished = [load_record(BasisCheckpoint, p) for p in sorted(parts.glob("part-*.safetensors"))]
        bar = tqdm(
            total=len(chosen), initial=len(finished), desc=f"basis {spec.label}", disable=None, leave=False
        )
        queue = list(finished)

        def note(part: BasisCheckpoint) -> BasisCheckpoint:
            # Written through the keeping map, so that cost and part survive together.
            index = len(queue)
            list(keep(lambda _: part, [index]))
            shutil.rmtree(parts / f"products-{index:05d}", ignore_errors=True)
            queue.append(part if not large else load_record(BasisCheckpoint, part_path(parts, index)))
            bar.update()
            return queue[-1]

        basis = hessian_basis(
            run.objective,
            chosen,
            run.task.splits.curvature,
            generator=generator,
            k=spec.per_checkpoint,
            tolerance=spec.tolerance,
            max_products=spec.max_products,
            mask=mask,
            finished=finished,
            on_checkpoint=note,
            keep_products=lambda index, product: kept_products(
                parts / f"products-{index:05d}", product, ledger
            ),
            rows_in_memory=budget,
            allocate=(lambda count, width: mapped_rows(parts / "rows.bin", count, width)) if large else None,
            kind=spec.kind,
        )
        bar.close()
        return dataclasses.replace(basis[: spec.vectors], products=basis.products)
    return _further_basis(run, spec, checkpoints)


def _further_basis(run: Run, spec: BasisConfig, checkpoints: Checkpoints) -> Basis:
    """A basis by its name in ``basis_kinds``, from the odd checkpoints."""
    from polca_edit.basis import build
    from polca_edit.basis.path import odd_checkpoints

    folder = SeriesFolder(run.directory.checkpoints)
    inputs = build.BasisInputs(
        run.objective,
        odd_checkpoints(checkpoints),
        run.task.splits.curvature,
        build.output_logits if run.config.task == "arithmetic" else None,
        build.recorded_second_moments(folder, run.task.space, run.config.training.betas[1]),
        run.config.seed,
        spec.tolerance,
        spec.max_products,
        None if spec.include == ("*",) else run.task.space.mask(spec.include),
    )
    return build.build_basis(spec.kind, inputs, spec.vectors)


def _projections(run: Run, stage: str) -> None:
    labels = [b.label for b in run.config.measured_bases()]
    bases = [load_record(Basis, run.directory.basis(label)) for label in labels]
    checkpoints, tokens = run.checkpoints(), run.task.splits.select
    parts = run.directory.path / "projections" / "parts"
    outputs = [run.directory.projections(label) for label in labels]
    with run.directory.stage(stage, run.key(stage), outputs, run.objective.passes, parts=parts):
        mapped = kept_parts(parts, CheckpointSlopes, Ledger(parts, run.objective.passes))
        indices = range(len(checkpoints))
        wanted = [i for i in indices if not part_path(parts, i).exists()]
        with slope_engine(run, checkpoints, bases, tokens, wanted) as at:
            slopes = list(
                tqdm(
                    mapped(at, indices), total=len(checkpoints), desc="projections", disable=None, leave=False
                )
            )
        for number, (basis, path) in enumerate(zip(bases, outputs, strict=True)):
            projections = assemble(checkpoints, basis, number, slopes)
            if run.config.rule == "second_order":
                means, curvatures = second_order_terms(
                    run.objective, checkpoints, basis, run.task.splits.curvature
                )
                projections = dataclasses.replace(projections, mean_gradients=means, curvatures=curvatures)
            save_record(path, projections)


def _clusters(run: Run, stage: str) -> None:
    label = stage.partition(":")[2]
    path = run.directory.clusters(label)
    with run.directory.stage(stage, run.key(stage), [path], run.objective.passes):
        save_record(path, ClusterRecord.of(load_observation(run, label)))


def load_observation(run: Run, label: str) -> Observation:
    """Allocation and clusters of a basis, recomputed from stored projections (seconds, no model)."""
    projections = load_record(Projections, run.directory.projections(label))
    return analyse(projections, run.task.splits.select, run.settings())
