"""Stream mode "leader": what the chain that is ahead thinks, live, while nobody has won yet.

The first chain to write leads. It loses the lead to the first that is done thinking, and when it is given up or fails,
to whoever has thought most. What was shown is never taken back: the thoughts of a new leader, and of a winner who did
not lead, come whole and as a paragraph of their own, after an event that says so.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from thinkserve.strategies.around import Around, Open
from thinkserve.strategies.engine import Delta, Emit, Engine, Event, Job, Piece, Stream, Task
from thinkserve.strategies.pieces import Transcript
from thinkserve.strategies.streams import Through


class Leader(Around):
    """Follows the chains that begin at the task's prompt; `commit` is to get what the strategy emits.

    Both hand on to `show`, which sees every token of the winner's once and in order.
    """

    def __init__(self, inner: Engine, task: Task, show: Emit) -> None:
        super().__init__(inner)
        self._task, self._show = task, show
        self._chains: list[_Followed] = []
        self._leader: _Followed | None = None
        # Thoughts of the paragraph on show, and how many of them the winner has confirmed.
        self._shown: list[int] = []
        self._confirmed = 0
        self._decided = False

    @asynccontextmanager
    async def watch(self, open: Open, job: Job) -> AsyncIterator[Stream]:
        """Run a job; of a whole chain, see what it thinks."""
        async with open(job) as stream:
            if job.role != "target" or job.prompt != self._task.prompt:
                yield stream
                return
            chain = _Followed(stream, self, Transcript(self._inner.info(), self._task.phase))
            self._chains.append(chain)
            try:
                yield chain
            finally:
                self._chains.remove(chain)
                if self._leader is chain and not chain.done:
                    self._leader = None

    async def follow(self, chain: _Followed) -> None:
        """Show what the leader has thought since; `chain` has just written."""
        lead = self._leader
        if lead is None:
            lead = max(self._chains, key=lambda each: len(each.thoughts))
        elif chain.done and not lead.done:
            lead = chain
        changes = lead is not self._leader
        if self._decided or not (changes or lead is chain):
            return
        self._leader = lead
        if changes:
            await self._anew()
        # Meanwhile another may have taken the lead, or won.
        if self._leads(lead) and (new := lead.thoughts[len(self._shown) :]):
            self._shown += new
            await self._show(Piece("thinking", tuple(new)))

    def _leads(self, chain: _Followed) -> bool:
        return self._leader is chain and not self._decided

    async def commit(self, item: Piece | Event) -> None:
        """Hand on what the strategy emits, less the thoughts that are on show already."""
        if isinstance(item, Event):
            await self._show(item)
            return
        self._decided = True
        if item.phase == "thinking":
            item = await self._unseen(item)
        if item.tokens:
            await self._show(item)

    async def _unseen(self, piece: Piece) -> Piece:
        """What of the winner's thoughts is not on show; all from the beginning if those on show are another's."""
        ahead = self._shown[self._confirmed : self._confirmed + len(piece.tokens)]
        if list(piece.tokens[: len(ahead)]) == ahead:
            self._confirmed += len(ahead)
            return Piece("thinking", piece.tokens[len(ahead) :])
        before = tuple(self._shown[: self._confirmed])
        await self._anew()
        return Piece("thinking", before + piece.tokens)

    async def _anew(self) -> None:
        begun, self._shown, self._confirmed = bool(self._shown), [], 0
        if begun:
            await self._show(Event("leader"))


class _Followed(Through):
    """The stream of one chain: `thoughts` are its tokens up to the end of thinking, tags included."""

    __slots__ = ("_race", "_transcript", "thoughts")

    def __init__(self, inner: Stream, race: Leader, transcript: Transcript) -> None:
        super().__init__(inner)
        self._race, self._transcript = race, transcript
        self.thoughts: list[int] = []

    @property
    def done(self) -> bool:
        """Whether it has done its thinking."""
        return self._transcript.phases.closed

    async def __anext__(self) -> Delta:
        delta = await self._inner.__anext__()
        self._transcript.push(delta)
        for piece in self._transcript.take():
            if piece.phase == "thinking":
                self.thoughts.extend(piece.tokens)
        await self._race.follow(self)
        return delta
