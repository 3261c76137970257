"""Votes: equal answers are grouped, the largest group wins, and every tie has one deterministic way out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from thinkserve.strategies.equivalence import shared

Equal = Callable[[str, str], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Ballot:
    """What one chain says: its sample index, its thinking length in tokens, its answer (None: none to be found)."""

    index: int
    length: int
    answer: str | None


@dataclass(frozen=True, slots=True)
class Group:
    """Ballots with equal answers, shortest first, sample index after that."""

    ballots: tuple[Ballot, ...]

    @property
    def shortest(self) -> Ballot:
        """The ballot that stands for the group."""
        return self.ballots[0]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The chain that won, and the votes of every answer (as its shortest chain wrote it), most votes first."""

    winner: Ballot
    votes: Mapping[str, int]


async def vote(ballots: Iterable[Ballot], equal: Equal | None = None) -> Verdict:
    """The shortest member of the largest group; of equally large groups the one with the shortest member.

    A ballot without an answer has no vote; when all are without, the shortest wins. ValueError without ballots.
    """
    ordered = sorted(ballots, key=_rank)
    if not ordered:
        raise ValueError("a vote needs at least one ballot")
    groups = await cluster(ordered, equal or shared().patient())
    groups.sort(key=lambda group: (-len(group.ballots), _rank(group.shortest)))
    winner = groups[0].shortest if groups else ordered[0]
    return Verdict(winner, {group.shortest.answer or "": len(group.ballots) for group in groups})


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
