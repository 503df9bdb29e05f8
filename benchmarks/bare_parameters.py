"""``python -m benchmarks.bare_parameters``: slopes of a transformer of ``einsum`` and ``nn.Parameter``.

The route watched parameters take now, beside the ones such a model fell back to (``traced``, ``jvp``), and
beside the same network built of ``nn.Linear``. Before anything is timed, all give the same slopes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.timing import Clock, Row, interleaved
from experiments.run.machine import hardware, versions
from polca_edit.checkpoints.files import write_json
from polca_edit.derivatives.objective import Objective
from polca_edit.derivatives.routes import Route
from polca_edit.tokens import TokenSet

WORDS, LENGTH, WIDTH, HEADS, LAYERS, SCORED = 32, 16, 64, 4, 2, 4


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (B, H, L, E)."""
    scores = torch.einsum("bhle,bhme->bhlm", q, k) / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhlm,bhme->bhle", scores.masked_fill(later, -1e9).softmax(-1), v)


class Block(nn.Module):
    """A layer of bare parameters; ``layers=True`` uses the same values through ``nn.Linear``."""

    def __init__(self, *, layers: bool) -> None:
        super().__init__()
        d, e, f = WIDTH, WIDTH // HEADS, 4 * WIDTH
        small = WIDTH**-0.5
        drawn = [torch.randn(*s) * small for s in ((HEADS, d, e),) * 3 + ((HEADS, e, d), (d, f), (f, d))]
        self.layers = layers
        if layers:
            flat = [w.permute(1, 0, 2).reshape(d, d) for w in drawn[:3]] + [
                drawn[3].reshape(d, d),
                *drawn[4:],
            ]
            self.maps = nn.ModuleList(nn.Linear(*w.shape, bias=False) for w in flat)
            for one, weight in zip(self.maps, flat, strict=True):
                one.weight.data = weight.T.contiguous()  # type: ignore[union-attr]
            self.norm = nn.LayerNorm(d, bias=False)
        else:
            self.q, self.k, self.v, self.o, self.up, self.down = (nn.Parameter(w) for w in drawn)
            self.gain = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        if self.layers:
            normed, maps = self.norm(x), self.maps
            q, k, v = (m(normed).unflatten(2, (HEADS, -1)).transpose(1, 2) for m in maps[:3])
            x = x + maps[3](attend(q, k, v).transpose(1, 2).flatten(2))
            return x + maps[5](functional.gelu(maps[4](x)))  # type: ignore[no-any-return]
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.gain
        q, k, v = (torch.einsum("bld,hde->bhle", normed, w) for w in (self.q, self.k, self.v))
        x = x + torch.einsum("bhle,hed->bld", attend(q, k, v), self.o)
        return x + functional.gelu(x @ self.up) @ self.down


class Transformer(nn.Module):
    """Two layers between a table of words and an output matrix."""

    def __init__(self, *, layers: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        words, places = torch.randn(WORDS, WIDTH) * 0.1, torch.randn(LENGTH, WIDTH) * 0.1
        out = torch.randn(WIDTH, WORDS) * 0.1
        self.layers = layers
        self.blocks = nn.ModuleList(Block(layers=layers) for _ in range(LAYERS))
        if layers:
            self.words = nn.Embedding.from_pretrained(words, freeze=False)
            self.places = nn.Embedding.from_pretrained(places, freeze=False)
            self.head = nn.Linear(WIDTH, WORDS, bias=False)
            self.head.weight.data = out.T.contiguous()
        else:
            self.words, self.places, self.out = (nn.Parameter(w) for w in (words, places, out))  # type: ignore[assignment]

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, V)."""
        if self.layers:
            x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        else:
            x = self.words[ids] + self.places[: ids.shape[1]]  # type: ignore[index]
        for block in self.blocks:
            x = block(x)
        return self.head(x) if self.layers else x @ self.out  # type: ignore[no-any-return]


def token_loss(module: nn.Module, ids: Tensor) -> Tensor:
    """(B, P) nats."""
    logits = module(ids[:, :-1])
    targets = ids[:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(
        targets
    )


def some_tokens(sequences: int) -> TokenSet:
    """Random ids, the last four predictions of each sequence scored."""
    ids = torch.randint(0, WORDS, (sequences, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    scored = torch.zeros(sequences, LENGTH, dtype=torch.bool)
    scored[:, -SCORED:] = True
    return TokenSet(ids, scored, torch.arange(sequences))


def rows_of(sequences: int, vectors: int, pairs: int, clock: Clock) -> list[Row]:
    """Ours is always the bare model by the route that ``auto`` takes."""
    tokens = some_tokens(sequences)

    def prepared(layers: bool, route: Route) -> tuple[Objective, Any, Tensor]:
        objective = Objective(Transformer(layers=layers), token_loss, route=route)
        theta = objective.space.read(objective.module)
        drawn = torch.randn(vectors, theta.numel(), generator=torch.Generator().manual_seed(2))
        drawn /= theta.numel() ** 0.5
        found = objective.directional(theta, drawn, tokens, expected=100 * vectors)[1]
        return objective, lambda: objective.directional(theta, drawn, tokens, expected=100 * vectors), found

    objective, ours, slopes = prepared(False, "auto")
    found = []
    for name, layers, route in (
        ("bare parameters: watched calls against a trace", False, "traced"),
        ("bare parameters: watched calls against jvp", False, "jvp"),
        ("bare parameters against the same net of nn.Linear", True, "auto"),
    ):
        other, work, theirs = prepared(layers, route)  # type: ignore[arg-type]
        notes: dict[str, Any] = {"our_route": objective.route_used, "other_route": other.route_used}
        if not layers:
            apart = float((slopes - theirs).abs().max() / theirs.abs().max())
            if not apart < 1e-5:
                raise ValueError(
                    f"both routes must give the same slopes, they differ by {apart:.1e} of the largest"
                )
            notes["largest_difference"] = apart
        found.append(interleaved(name, ours, work, pairs=pairs, clock=clock, **notes))
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bare_parameters", description=__doc__)
    parser.add_argument(
        "--sequences", type=int, default=64, help="sequences of 16 predictions, 4 of them scored"
    )
    parser.add_argument("--vectors", type=int, default=24, help="directions")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="cpu", help="seconds that are compared")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", type=Path, help="write the rows")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    started = time.perf_counter()
    rows = rows_of(given.sequences, given.vectors, given.pairs, given.clock)
    for row in rows:
        print(
            f"{row.name:<52} ours {row.ours:.3f} s  other {row.rival:.3f} s  ratio {row.ratio_median:.2f} "
            f"({row.ratio_min:.2f} to {row.ratio_max:.2f}, {row.pairs} pairs)"
        )
    if given.json is not None:
        config = {key: value for key, value in vars(given).items() if key != "json"}
        write_json(
            given.json,
            {
                "rows": [dataclasses.asdict(row) for row in rows],
                "config": config,
                "versions": versions(),
                "hardware": hardware(),
                "seconds": time.perf_counter() - started,
            },
        )


if __name__ == "__main__":
    main()
