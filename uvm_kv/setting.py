"""How an option is declared: once, beside what heeds it.

A declaration is a dataclass field with a default, and a `Rule` for the values it takes, for the jobs that heed it and
for what it means for a comparison. From the rules follow by program (`uvm_kv.config.settings`): errors for values that
are not allowed and for options that a job would ignore, the run id, and what two runs must share to be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

RULE = "rule"
"""Key of the rule in a field's metadata."""


class Role(Enum):
    """What a difference in an option makes of two runs."""

    SETTING = "other comparison"
    """Points of two comparisons."""
    VARIANT = "other variant"
    """Points of two variants of a mechanism, in one comparison."""
    NO_RESULT = "same run"
    """No result depends on it, nor does the run id."""


@dataclass(frozen=True)
class Rule:
    """What is known of an option beside its default."""

    allowed: tuple[Any, ...] = ()
    """All values that it takes; empty where they are numbers, texts or switches."""
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    """Bounds of a number: `least` and `most` are allowed, `above` and `below` are not."""
    heeded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By the path of another option, the values with which a job heeds this one; empty: every job does."""
    lenient: tuple[str, ...] = ()
    """Paths of `heeded` for which a job may ignore the option without a word, as other jobs of its sweep heed it."""
    role: Role = Role.SETTING

    def bounds(self) -> str | None:
        """The allowed numbers in words; None where all are."""
        words = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound:.15g}" for word, bound in words.items() if math.isfinite(bound)) or None

    def admits(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below


def setting(default: Any, **rule: Any) -> Any:
    """A field of a dataclass that declares an option; the keywords are those of `Rule`."""
    return field(default=default, metadata={RULE: Rule(**rule)})
