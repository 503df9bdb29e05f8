"""Numbers and contexts as every table and figure writes them: a true minus, "–" for what is missing."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

MISSING = "–"


def _printed(text: str) -> str:
    """A true minus sign, and none before a zero."""
    if not text.strip("+-0.,"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def nats(value: float | None, digits: int = 3) -> str:
    """A signed loss change.

    >>> nats(-2.2951), nats(0.0), nats(None), nats(4.638, 2)
    ('−2.295', '0.000', '–', '+4.64')
    """
    return MISSING if value is None else _printed(f"{value:+.{digits}f}")


def share(value: float | None) -> str:
    r"""A share in percent, with enough digits to tell a small one from zero.

    >>> share(0.9985), share(0.0006), share(0.0), share(2.187), share(None)
    ('99.9\xa0%', '0.06\xa0%', '0\xa0%', '219\xa0%', '–')
    """
    if value is None:
        return MISSING
    size = abs(100 * value)
    style = ".2g" if size < 1 else ".1f" if size < 99.95 else ".0f"
    return _printed(f"{100 * value:{style}}") + "\N{NO-BREAK SPACE}%"


def decimal(value: float | None, digits: int = 2) -> str:
    """A number with fixed decimals.

    >>> decimal(0.854), decimal(-0.001), decimal(None)
    ('0.85', '0.00', '–')
    """
    return MISSING if value is None else _printed(f"{value:,.{digits}f}")


def number(value: float | None, digits: int = 3) -> str:
    """A number with a few significant digits.

    >>> number(0.000312), number(None), number(-41.237), number(1183.2)
    ('0.000312', '–', '−41.2', '1,183')
    """
    if value is None:
        return MISSING
    return _printed(f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.{digits}g}")


def count(value: float) -> str:
    """A whole number with thousands apart.

    >>> count(9475594)
    '9,475,594'
    """
    return f"{value:,.0f}"


def listed(names: list[str]) -> str:
    """Names as a sentence has them.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def highlighted(context: str) -> Markup:
    """A context with its scored token, given in square brackets, marked.

    >>> str(highlighted("1<2=[3]"))
    '1&lt;2=<mark>3</mark>'
    """
    found = re.match(r"^(.*)\[(.*)\](.*)$", context, re.DOTALL)
    if found is None:
        return escape(context)
    before, token, after = (escape(part) for part in found.groups())
    return before + Markup("<mark>") + token + Markup("</mark>") + after
