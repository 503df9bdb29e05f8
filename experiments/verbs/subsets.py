"""Options ``--layers`` and ``--parameters``: every basis of a config confined to some of the weights."""

from __future__ import annotations

import re
from typing import Any


def patterns_of(layers: str | None, parameters: str | None) -> tuple[str, ...]:
    """Patterns on parameter names; the number of a layer is the first one that stands between dots.

    >>> patterns_of("3-4", None), patterns_of("0", "*mlp*"), patterns_of(None, "*mlp*")
    (('*.3.*', '*.4.*'), ('*.0.*mlp*',), ('*mlp*',))

    Raises:
        ValueError: for layers that are no numbers or ranges.
    """
    if layers is None:
        return ("*",) if parameters is None else (parameters,)
    numbers: list[int] = []
    for part in layers.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        last = -1 if found is None else int(found[2] or found[1])
        if found is None or last < int(found[1]):
            raise ValueError(f"--layers must be numbers or ranges such as 3-5 or 0,2, got '{layers}'")
        numbers += range(int(found[1]), last + 1)
    return tuple(f"*.{number}.{parameters or '*'}" for number in dict.fromkeys(numbers))


def confined(
    named: str, overrides: dict[str, Any], layers: str | None, parameters: str | None
) -> dict[str, Any]:
    """The overrides with every basis confined; unchanged where neither option is given."""
    if layers is None and parameters is None:
        return overrides
    from experiments.config import load_config

    include = patterns_of(layers, parameters)
    bases = [
        spec.model_copy(update={"include": include}).model_dump(mode="json")
        for spec in load_config(named, overrides).bases
    ]
    return {**overrides, "bases": bases}
