"""When it is looked whether all is decided: a plan made before the first block is timed.

Whoever looks at the data after every round and stops when he likes what he sees finds differences where there are none.
So the looks are few and declared beforehand, and each may spend a share of the probability of a wrong claim. The shares
add up to ALPHA: by the union bound the whole procedure errs no more often than that, however the looks depend on each
other (a stricter form of Lan and DeMets, 1983).

What differs from one launch of a process to the next is averaged over launches only, and what differs from round to
round over both. A look at R rounds has about the square root of R launches, each of as many rounds; every look adds at
least one launch, so that a look never falls into the middle of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field, model_validator

from pipeline.artifact import Frozen

MARGIN = 0.01
"""Speeds within this share of each other are equivalent."""

ALPHA = 0.05
"""Probability that any verdict of a table is wrong, all looks together."""

LEAST_ROUNDS = 3
"""Fewer rounds give no interval that is worth printing."""

ROUNDS_OF_A_LAUNCH = 4
"""Where not even the first look fits, a further launch is worth its start if each has so many rounds."""

FEW_LAUNCHES = 3
"""Fewer say little about what differs between launches."""

LOPSIDED = 4
"""Launches with so many times the rounds of the others carry the result almost alone."""

WORTH_ADDING = 1.5
"""Where the next look does not fit, one at fewer rounds is worth its share from so many times the rounds before."""


class Look(Frozen):
    """One look at the data; rounds and launches are counted from the beginning."""

    rounds: int = Field(ge=1)
    launches: int = Field(ge=1)
    alpha: float = Field(gt=0, lt=1, description="probability of any wrong verdict that this look may spend")


class LookPlan(Frozen):
    """The looks, in order, and the margin that the verdicts refer to."""

    looks: tuple[Look, ...] = Field(min_length=1)
    margin: float = Field(default=MARGIN, gt=0, lt=1)

    @model_validator(mode="after")
    def _grows(self) -> LookPlan:
        for a, b in zip(self.looks, self.looks[1:], strict=False):
            if a.rounds >= b.rounds or a.launches >= b.launches:
                raise ValueError(f"every look needs more rounds and more launches than the one before: {a}, {b}")
        if any(look.rounds < look.launches for look in self.looks):
            raise ValueError("a launch needs at least one round")
        return self

    @classmethod
    def declare(cls, rounds: Sequence[int], margin: float = MARGIN) -> LookPlan:
        """The plan for looks after `rounds` rounds in all, ascending, as in `evaluate.looks`.

        Raises: ValueError where they are none or do not ascend.
        """
        return _plan([(count, launches_for(count)) for count in rounds], margin)

    @property
    def rounds_by_launch(self) -> tuple[int, ...]:
        """Rounds of each launch, in the order of launches; a look follows the last round of a launch."""
        found: list[int] = []
        rounds = 0
        for look in self.looks:
            added, new = look.rounds - rounds, look.launches - len(found)
            found += [added // new + (i < added % new) for i in range(new)]
            rounds = look.rounds
        return tuple(found)

    def within(self, rounds: int, launches: int) -> LookPlan:
        """The plan cut down, before any data are seen, to at most so many rounds and launches in all.

        Looks that do not fit are left out. Where much more fits than the last look that stays, another is made of it;
        where none fits, the one look takes what fits, down to one launch.
        """
        kept = [(look.rounds, look.launches) for look in self.looks if look.rounds <= rounds]
        kept = [(r, n) for r, n in kept if n <= launches]
        if len(kept) == len(self.looks):
            return self
        most = max(1, min(rounds, self.looks[-1].rounds))
        if not kept or most >= WORTH_ADDING * kept[-1][0]:
            while kept and _lopsided(kept[-1], most, launches):
                kept.pop()
            wanted = max(launches_for(most), kept[-1][1] + 1 if kept else 1)
            kept.append((most, max(min(wanted, launches, most), 1)))
        return _plan(kept[-len(self.looks) :], self.margin)

    def within_budget(self, budget_s: float, *, round_s: float, launch_s: float) -> LookPlan:
        """The plan cut down to what `budget_s` seconds hold, where a round and the start of a launch take so long.

        As few as LEAST_ROUNDS rounds of one launch are planned even where they do not fit; compare `seconds`.
        """

        def fits(rounds: int, launches: int) -> bool:
            return rounds * round_s + launches * launch_s <= budget_s

        kept = [look for look in self.looks if fits(look.rounds, look.launches)]
        if len(kept) == len(self.looks):
            return self
        most = self.looks[len(kept)].rounds
        if kept:
            before = kept[-1]
            for rounds in range(most - 1, math.ceil(WORTH_ADDING * before.rounds) - 1, -1):
                launches = max(launches_for(rounds), before.launches + 1)
                if fits(rounds, launches):
                    return self.within(rounds, launches)
            return self.within(before.rounds, before.launches)
        if len(self.looks) == 1:  # so many rounds were asked for: rather fewer launches than fewer rounds
            for launches in range(self.looks[0].launches, FEW_LAUNCHES - 1, -1):
                if fits(most, launches):
                    return self.within(most, launches)
        # fewer launches before fewer rounds in each: noise of rounds is the larger part when there are few
        for launches in range(self.looks[0].launches, 0, -1):
            left = (budget_s - launches * launch_s) / round_s if round_s > 0 else most
            rounds = min(most, int(left))
            if rounds >= (ROUNDS_OF_A_LAUNCH * launches if launches > 1 else LEAST_ROUNDS):
                return self.within(rounds, launches)
        return self.within(min(most, LEAST_ROUNDS), 1)

    def seconds(self, *, round_s: float, launch_s: float) -> tuple[float, ...]:
        """Seconds until each look, where a round and the start of a launch take so long."""
        return tuple(look.rounds * round_s + look.launches * launch_s for look in self.looks)


def launches_for(rounds: int) -> int:
    """Launches that so many rounds are spread over."""
    return max(1, round(math.sqrt(rounds)))


def _lopsided(before: tuple[int, int], rounds: int, launches: int) -> bool:
    """Whether the launches after `before` would have far more rounds than those up to it, or none would be left."""
    new = min(launches, launches_for(rounds)) - before[1]
    return new < 1 or (rounds - before[0]) / new > LOPSIDED * before[0] / before[1]


def _plan(looks: Sequence[tuple[int, int]], margin: float) -> LookPlan:
    found: list[Look] = []
    for rounds, launches in looks:
        more = max(launches, found[-1].launches + 1 if found else 1)
        found.append(Look(rounds=rounds, launches=more, alpha=ALPHA / len(looks)))
    return LookPlan(looks=tuple(found), margin=margin)
