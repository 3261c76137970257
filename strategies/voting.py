"""Votes: equal answers are grouped, the largest group wins, and every tie has one deterministic way out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from math import fsum

from thinkserve.strategies.equivalence import shared

Equal = Callable[[str, str], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Ballot:
    """What one chain says: its sample index, its thinking length in tokens, its answer (None: none to be found).

    `weight` is what its vote counts, >= 0.
    """

    index: int
    length: int
    answer: str | None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Group:
    """Ballots with equal answers, shortest first, sample index after that."""

    ballots: tuple[Ballot, ...]

    @property
    def shortest(self) -> Ballot:
        """The ballot that names the group."""
        return self.ballots[0]

    @property
    def weight(self) -> float:
        """What the votes of all members count."""
        return fsum(ballot.weight for ballot in self.ballots)

    @property
    def winner(self) -> Ballot:
        """The ballot that stands for the group: the weightiest, of equal ones the shortest."""
        return min(self.ballots, key=lambda ballot: (-ballot.weight, *_rank(ballot)))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The chain that won, and votes and weight of every answer (as its shortest chain wrote it), weightiest first."""

    winner: Ballot
    votes: Mapping[str, int]
    weights: Mapping[str, float]


async def vote(ballots: Iterable[Ballot], equal: Equal | None = None) -> Verdict:
    """The weightiest, then shortest member of the weightiest group.

    Of equal groups the one with more members wins, then the one with the shortest. A ballot without an answer has no
    vote; when all are without, the weightiest, then shortest wins. ValueError without ballots.
    """
    ordered = sorted(ballots, key=_rank)
    if not ordered:
        raise ValueError("a vote needs at least one ballot")
    groups = await cluster(ordered, equal or shared().patient())
    groups.sort(key=lambda group: (-group.weight, -len(group.ballots), _rank(group.shortest)))
    winner = (groups[0] if groups else Group(tuple(ordered))).winner
    named = {group.shortest.answer or "": group for group in groups}
    votes = {answer: len(group.ballots) for answer, group in named.items()}
    return Verdict(winner, votes, {answer: group.weight for answer, group in named.items()})


async def cluster(ballots: Iterable[Ballot], equal: Equal) -> list[Group]:
    """Group ballots whose answers equal that of a group's shortest member; the order of `ballots` does not matter."""
    groups: list[list[Ballot]] = []
    places: dict[str, list[Ballot]] = {}
    for ballot in sorted(ballots, key=_rank):
        if ballot.answer is None:
            continue
        group = places.get(ballot.answer) or await _find(groups, ballot.answer, equal)
        if group is None:
            group = []
            groups.append(group)
        group.append(ballot)
        places[ballot.answer] = group
    return [Group(tuple(group)) for group in groups]


async def _find(groups: list[list[Ballot]], answer: str, equal: Equal) -> list[Ballot] | None:
    for group in groups:
        if await equal(group[0].answer or "", answer):
            return group
    return None


def _rank(ballot: Ballot) -> tuple[int, int]:
    return ballot.length, ballot.index
