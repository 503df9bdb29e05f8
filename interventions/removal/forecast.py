"""What undoing a skill will do, said before it is done: a record and its sentences, no model at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from interventions.discovery.windows import Window

#: A group that is predicted to lose this share of its headroom falls with the skill.
FALLING = 0.1


@dataclass(frozen=True)
class Forecast:
    """What the timeline says about removing a skill by undoing, before anything is trained.

    Attributes:
        skill: what is to be removed.
        window: steps in which it was learned.
        share: of the skill's own headroom lost when the windows are undone in the final model.
        falls: other group -> share of its headroom lost with it, before any repair.
        descendants: groups learned later that fall with its window and not the other way round.
        fraction: share of training that came after the first window's start.
        windows: that will be undone; empty while they are still to be compared: ``window`` stands for them.
        method: ``rollback`` or ``return``.
        rank: directions along which movement is undone; 0 for all of it.
    """

    skill: str
    window: Window
    share: float
    falls: Mapping[str, float]
    descendants: tuple[str, ...]
    fraction: float
    windows: tuple[Window, ...] = ()
    method: str = "rollback"
    rank: int = 0

    @property
    def act(self) -> str:
        """What is done to the final model, in words."""
        windows = self.windows or (self.window,)
        if self.method == "return":
            return f"going back to step {min(window.start for window in windows)}"
        along = "" if not self.rank else f" along {self.rank} direction{'s' if self.rank > 1 else ''}"
        return f"undoing steps {', '.join(map(str, windows))}{along}"

    def sentences(self) -> tuple[str, ...]:
        """What will happen, in words."""
        lost = {name: value for name, value in self.falls.items() if value >= FALLING}
        named = ", ".join(f"{name} {value:.0%}" for name, value in sorted(lost.items(), key=lambda e: -e[1]))
        # More than all of it would be worse than before training; by how much says nothing.
        taken = min(self.share, 1.0)
        begins = (
            f"{self.skill} was learned in steps {self.window}; {self.act} takes {taken:.0%} of it"
            f"{f' and with it, before repair: {named}' if named else ' and no other group'}"
        )
        since = "that step" if self.method == "return" else "they began"
        after = (
            f"{self.fraction:.0%} of training came after {since}; "
            "that much retraining is the most a repair can need"
        )
        built = (
            (f"{', '.join(self.descendants)} built on {self.skill} and must be taught again",)
            if self.descendants
            else ()
        )
        return (begins, *built, after)
