"""Numbers and contexts as the report writes them."""

from __future__ import annotations

import re
import textwrap

from markupsafe import Markup, escape


def percent(value: float) -> str:
    """A share with enough digits to tell a small one from zero.

    >>> percent(0.9985), percent(0.0006), percent(0.0)
    ('99.9 %', '0.06 %', '0 %')
    """
    size = abs(100 * value)
    return f"{100 * value:.1f} %" if size >= 1 else f"{100 * value:.2g} %"


def share_text(share: float | None) -> str:
    """An explained share in words.

    >>> share_text(0.861), share_text(None)
    ('86.1 %', 'not defined')
    """
    return "not defined" if share is None else f"{100 * share:.1f} %"


def nats(value: float | None) -> str:
    """A signed loss change.

    >>> nats(-2.2951), nats(0.0), nats(None)
    ('−2.295', '0.000', '–')
    """
    if value is None:
        return "–"
    text = f"{value:+.3f}"
    return "0.000" if text in ("+0.000", "-0.000") else text.replace("-", "−")


def share(value: float | None) -> str:
    """A share in percent, "–" where it is not defined."""
    return "–" if value is None else percent(value).replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """A number with a few significant digits.

    >>> number(0.000312), number(None), number(-41.237), number(1183.2)
    ('0.000312', '–', '−41.2', '1,183')
    """
    if value is None:
        return "–"
    return (f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.{digits}g}").replace("-", "−")


def count(value: float) -> str:
    """A whole number with thousands apart.

    >>> count(9475594)
    '9,475,594'
    """
    return f"{value:,.0f}"


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


def brief(label: str, width: int = 32) -> str:
    """A label for a narrow title; rules found for texts can be long.

    >>> brief("10s"), brief("token is ',' and previous shape is 'piece' and distance >= 7")
    ('10s', "token is ',' and previous ...")
    """
    return textwrap.shorten(label, width, placeholder=" ...")
