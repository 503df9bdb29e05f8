"""What long calls write into a log."""

from __future__ import annotations

import pytest

from polca_edit.allocation import progress as module


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(module, "LINES_EVERY", 0.0)


def test_a_known_number_is_said_with_the_time_that_is_left(capsys):
    assert list(module.progress([1, 2, 3], "counting")) == [1, 2, 3]
    assert "  counting: 2 of 3, " in capsys.readouterr().err


def test_an_unknown_number_is_not_made_up(capsys):
    assert list(module.progress(iter([1, 2, 3]), "counting")) == [1, 2, 3]
    said = capsys.readouterr().err
    assert "  counting: 2, " in said
    assert "?" not in said
    assert "left" not in said
