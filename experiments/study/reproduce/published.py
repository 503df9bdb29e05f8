"""Numbers of arXiv 2506.15872 (arithmetic), for printing beside ours."""

from __future__ import annotations

#: feature -> carry homogeneity, recall, F1, share of clusters with a hidden breakthrough (Tables 1, 8, 11).
CARRY: dict[str, tuple[float, float, float, float]] = {
    "exact_loss": (0.514, 0.771, 0.617, 0.0),
    "loss_change": (0.524, 0.958, 0.678, 0.0),
    "fisher": (0.664, 0.947, 0.781, 0.284),
    "lca": (0.792, 0.772, 0.782, 0.019),
    "first_order": (0.948, 0.767, 0.848, 0.307),
    "polca": (0.973, 0.736, 0.838, 0.355),
    "random": (0.902, 0.655, 0.759, 0.031),
    "shuffled_hessian": (0.856, 0.699, 0.769, 0.304),
}

#: feature -> homogeneity of its three best carry clusters (Tables 9, 10).
TOP_THREE: dict[str, tuple[float, float, float]] = {
    "polca": (0.973, 0.946, 0.903),
    "first_order": (0.948, 0.928, 0.887),
    "random": (0.902, 0.858, 0.838),
    "shuffled_hessian": (0.856, 0.852, 0.834),
    "fisher": (0.664, 0.643, 0.637),
    "lca": (0.792, 0.614, 0.592),
}

#: RMSE of Eq. 6's second-order term against the true one (Table 12, 400 tokens; no scale is given).
SECOND_ORDER_RMSE = 0.145
