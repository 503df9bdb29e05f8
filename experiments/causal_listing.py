"""Every operator and every control of the protocol by number: what it gave, or that it did not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from interventions.evidence import PairEvidence
from interventions.verdict import VerdictInputs

NOT_RUN = "not_run"


def operator_rows(
    evidence: Sequence[PairEvidence], inputs: VerdictInputs, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Operators O1-O6; loss in nats per token, pooled over runs where an interval is given.

    O4' (everything but the movement inserted early) reaches the weights of O1, so its gain is the
    headroom minus O1's damage.
    O6 stands beside the same search in other spans, run by run.
    """
    rewound = [e.rewound for e in evidence if e.rewound is not None]
    unblocked = f"{NOT_RUN}: {extra.get('blocking_not_run', 'only for causal pairs')}"
    branches: Mapping[str, Any] = extra.get("branches", {})
    unbranched = f"{NOT_RUN}: {extra.get('branches_not_run', 'only for causal pairs')}"
    return {
        "O1 project_out": asdict(inputs.damage),
        "O2 reverse": sorted(evidence[0].doses),
        "O3a rollback_subtract": NOT_RUN if inputs.window is None else asdict(inputs.window),
        "O3b rollback_rewind": float(np.mean(rewound)) if rewound else NOT_RUN,
        "O3c branch_skip": branches.get("branch_skip", unbranched),
        "O4 transplant": NOT_RUN if inputs.sufficiency is None else asdict(inputs.sufficiency),
        "O4' complement": inputs.headroom.estimate - inputs.damage.estimate,
        "O5 block": unblocked if inputs.blocking is None else asdict(inputs.blocking),
        "O5'' amplify": branches.get("amplify", unbranched),
        "O6 optimised": [e.extras["optimised"] for e in evidence if e.extras.get("optimised")]
        or f"{NOT_RUN}: optimised_draws is 0, or the pair moves nothing",
    }


def control_rows(evidence: Sequence[PairEvidence], inputs: VerdictInputs) -> dict[str, Any]:
    """Controls c1-c10: p-values and the draws of the shortest run."""
    found: dict[str, Any] = {}
    for rung in ("c1", "c2", "c3", "c4", "c5", "c6"):
        parts = sorted({f for e in evidence for f in e.controls if f.startswith(rung)})
        p = inputs.control_p.get(rung)
        if rung in inputs.not_applicable:
            found[rung] = "not_applicable"
        elif not parts or p is None:
            found[rung] = NOT_RUN
        else:
            draws = min(len(e.controls[f]) for e in evidence for f in parts if f in e.controls)
            found[rung] = {"p_value": p, "draws": draws}
    families = {
        family: {"p_value": p, "draws": min(len(e.reference[family]) for e in evidence)}
        for family, p in inputs.pipeline_families.items()
    }
    found["c7"] = {
        family: families.get(family, NOT_RUN) for family in ("rotation", "random", "shuffled_hessian")
    }
    shuffled = [e.extras.get("label_shuffle_p") for e in evidence]
    found["c8"] = {"p_values": shuffled} if any(p is not None for p in shuffled) else NOT_RUN
    shams = [e.extras.get("sham_cluster_effect") for e in evidence]
    found["c9"] = {
        "sham_cluster_effects": shams if any(s is not None for s in shams) else NOT_RUN,
        "sham_windows": min(len(e.sham_windows) for e in evidence) or NOT_RUN,
        "other_seed": _other_seeds(evidence),
    }
    found["c10"] = {"outcome": inputs.positive_control, "detectable_share": inputs.detectable_share}
    return found


def _other_seeds(evidence: Sequence[PairEvidence]) -> Any:
    """Effects of the same coordinates along other seeds' vectors."""
    effects = [value for e in evidence for value in e.extras.get("other_seed_effects", [])]  # type: ignore[attr-defined]
    aligned = sum(int(e.extras.get("other_seeds_aligned", 0)) for e in evidence)  # type: ignore[call-overload]
    if not effects and not aligned:
        return f"{NOT_RUN}: one run only"
    return {"effects": effects, "aligned": aligned}
