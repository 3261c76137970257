"""From the chains of a race to one answer: by vote, else from answers cut short, else forced out of the longest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from thinkserve.strategies.chain import continued
from thinkserve.strategies.chains import Lane, Race
from thinkserve.strategies.engine import Answer, Event, Finish, Piece, StoppedBy, Tokens
from thinkserve.strategies.pieces import injected
from thinkserve.strategies.single import STOPPED_BY
from thinkserve.strategies.text import answer_of
from thinkserve.strategies.voting import Ballot, Verdict, vote

FORCED_TOKENS = 1024
# What a short answer takes.
SHORT_ANSWER = 32
FORCED = "no chain finished thinking within its tokens; an answer was forced from the longest"
UNFORCED = "no chain finished thinking within its tokens, and the request ended before an answer could be forced"
_CUT: frozenset[Finish | None] = frozenset({"ceiling", "deadline"})


@dataclass(frozen=True, slots=True)
class Choice:
    """The chain that gives the answer, why, and the votes if there was a vote."""

    lane: Lane
    reason: str
    votes: Mapping[str, int] = field(default_factory=dict[str, int])


Choose = Callable[[Race, Sequence[Lane]], Awaitable[Choice]]


async def by_vote(race: Race, voters: Sequence[Lane], weights: Mapping[int, float] = {}) -> Choice:
    """The answer with most votes; `weights` says what the vote of a chain (by index) counts, otherwise 1."""
    verdict = await vote([_ballot(race, lane, weights.get(lane.index, 1.0)) for lane in voters])
    told: dict[str, object] = {"votes": dict(verdict.votes), "voters": [lane.index for lane in voters]}
    await race.emit(Event("vote", None, told | ({"weights": dict(verdict.weights)} if weights else {})))
    return Choice(race.lanes[verdict.winner.index], _reason(verdict, len(voters), bool(weights)), verdict.votes)


def _reason(verdict: Verdict, voters: int, weighted: bool) -> str:
    if not verdict.votes:
        return f"no answer to compare; the {'weightiest' if weighted else 'shortest'} chain"
    votes, weight = next(iter(verdict.votes.values())), next(iter(verdict.weights.values()))
    by_weight = f", by weight {weight:.3f} of {sum(verdict.weights.values()):.3f}" if weighted else ""
    return f"{votes} of {voters} votes{by_weight}"


async def settle(race: Race, members: Sequence[Lane], wanted: int, choose: Choose = by_vote) -> Answer:
    """Let `choose` decide among `members` (of `wanted`), emit the winner's pieces, and say why.

    Of the members those decide whose answer is complete: half of one may read as another. Without any, those whose
    answer was cut short decide; without members all such chains; without such, the longest is made to answer.
    """
    voters = [lane for lane in members if lane.complete] or members
    voters = voters or [lane for lane in race.left() if lane.transcript.answer]
    if not voters and (room := _room(race)):
        return await _force(race, _longest(race), room)
    choice = await _choose(race, voters, choose)
    winner = choice.lane
    if len(race.lanes) > 1:
        await race.emit(Event("winner", winner.index, {"reason": choice.reason}))
    for piece in winner.transcript.take():
        await race.emit(piece)
    return Answer(
        tuple(winner.transcript.tokens),
        winner.finish or "stop",
        winner.index,
        _stopped_by(race, winner, len(members) < wanted),
        choice.reason,
        choice.votes,
        tuple(race.warnings),
    )


async def _choose(race: Race, voters: Sequence[Lane], choose: Choose) -> Choice:
    if len(race.lanes) == 1:
        return Choice(race.lanes[0], "the only chain")
    if not voters:
        return Choice(_longest(race), "no chain finished; the longest as far as it came")
    return await choose(race, voters)


def _ballot(race: Race, lane: Lane, weight: float) -> Ballot:
    return Ballot(lane.index, lane.length, answer_of(race.engine.decode(lane.transcript.answer)), weight)


async def _force(race: Race, lane: Lane, room: int) -> Answer:
    """Close the chain's thinking ourselves, early enough that `room` tokens of answer keep it within its limit."""
    info = race.engine.info()
    kept = _cut(lane.transcript.take(), _limit(race) - room - len(info.think_close), info.eos)
    tokens = tuple(token for piece in kept for token in piece.tokens) + info.think_close
    await race.emit(Event("budget.forced", lane.index, {"tokens": len(tokens), "room": room}))
    close = injected(info.think_close, race.task.logprobs)
    for piece in [*kept, Piece("thinking", close.tokens, close.logprobs, close.top)]:
        await race.emit(piece)
    closed = len(tokens)
    finish: Finish = "stop"
    job = continued(lane.job, tokens, max_tokens=room, thinking_budget=None)
    async with race.engine.generate(job) as stream:
        async for delta in stream:
            tokens += delta.tokens
            finish = delta.finish or finish
            if delta.tokens:
                await race.emit(Piece("answer", delta.tokens, delta.logprobs, delta.top))
    stopped_by, said = STOPPED_BY.get(finish, "length"), FORCED if len(tokens) > closed else UNFORCED
    return Answer(tokens, finish, lane.index, stopped_by, said, {}, (*race.warnings, said))


def _room(race: Race) -> int:
    """Tokens for a forced answer: a quarter of the limit at most, within what the request may still write.

    0 when forcing is not possible or of no use.
    """
    lane, info = _longest(race), race.engine.info()
    if lane.live or not lane.thinking or any(each.finish in _CUT for each in race.left()):
        return 0
    room, most = min(FORCED_TOKENS, _limit(race) // 4), race.task.max_total_tokens
    if most is not None:
        left = most - sum(len(each.transcript.tokens) for each in race.lanes)
        room = 0 if left < min(room, SHORT_ANSWER) else min(room, left)
    return room if room + len(info.think_close) <= _limit(race) else 0


def _limit(race: Race) -> int:
    return min(race.task.max_tokens, race.engine.info().context - len(race.task.prompt))


def _longest(race: Race) -> Lane:
    return max(race.left(), key=lambda lane: (len(lane.transcript.tokens), -lane.index))


def _cut(pieces: Sequence[Piece], count: int, eos: Tokens) -> list[Piece]:
    """The first `count` tokens, and none from the first end of sequence on."""
    kept: list[Piece] = []
    for piece in pieces:
        ends = [at for at, token in enumerate(piece.tokens) if token in eos]
        stop = min([count, *ends])
        kept.append(Piece(piece.phase, piece.tokens[:stop], piece.logprobs[:stop], piece.top[:stop]))
        count -= stop
        if ends:
            break
    return [piece for piece in kept if piece.tokens]


def _stopped_by(race: Race, winner: Lane, short_of_members: bool) -> StoppedBy:
    finishes = {lane.finish for lane in race.lanes}
    if "ceiling" in finishes:
        return "budget"
    if "deadline" in finishes:
        return "deadline"
    if any(lane.dropped for lane in race.lanes):
        return "m_reached"
    if winner.finish == "length" or (short_of_members and "length" in finishes):
        return "length"
    if short_of_members and any(lane.error for lane in race.lanes):
        return "error"
    return "all_done"
