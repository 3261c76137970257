"""k chains of one task side by side: follow each to its end, drop losers at once, report, and settle on an answer.

A strategy decides in `on_finish` and `on_token`, which are plain functions: they see consistent state, call `drop`, and
return. The dropped chain's own task then leaves its `generate` block, which aborts it in the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from anyio import CancelScope
from anyio.lowlevel import checkpoint

from thinkserve.strategies.confidence import Figure, Mean
from thinkserve.strategies.engine import Delta, Emit, Engine, Event, Finish, Job, Task
from thinkserve.strategies.errors import EngineDead, EngineFailed
from thinkserve.strategies.pieces import Transcript
from thinkserve.strategies.together import together

PROGRESS_TOKENS = 32

Decide = Callable[["Lane"], None]


class Lane:
    """One chain of a race: what it has written, how far it is, how it ended.

    `place` is its position in the order of finishing, (turn, index): chains that finish in the same turn of the event
    loop finish together, and their index decides. `certainty` is known of chains that ask for statistics.
    """

    def __init__(self, index: int, job: Job, transcript: Transcript, live: bool, certainty: Figure) -> None:
        self.index = index
        self.job = job
        self.transcript = transcript
        self.certainty = certainty
        self.finish: Finish | None = None
        self.error: EngineFailed | None = None
        self.place: tuple[int, int] | None = None
        self.dropped = False
        self.live = live
        self.scope = CancelScope()
        self.reported = 0

    @property
    def length(self) -> int:
        """Thinking tokens; of a chain that has no think block, all of its tokens."""
        phases = self.transcript.phases
        return phases.length if phases.opened else len(self.transcript.tokens)

    @property
    def complete(self) -> bool:
        """Whether the text has come to its own end."""
        return self.finish in {"stop", "repetition"}

    @property
    def done_thinking(self) -> bool:
        """Whether the think block, be it empty, is closed; without a block, whether the text has come to its end."""
        phases = self.transcript.phases
        return phases.closed or (not phases.opened and self.complete)

    @property
    def finished(self) -> bool:
        """Whether the chain counts: it has done its thinking, and neither failed nor was dropped."""
        return self.place is not None and self.error is None and not self.dropped

    @property
    def thinking(self) -> bool:
        """Whether the chain is inside its think block."""
        return self.transcript.phases.phase == "thinking"

    def drop(self) -> None:
        """Give the chain up: its task ends at its next step and aborts it. One that has ended just loses its place."""
        self.dropped = True
        self.scope.cancel()

    def push(self, delta: Delta) -> None:
        """Take what the engine wrote."""
        self.transcript.push(delta)
        self.certainty.extend(each.certainty for each in delta.stats)
        self.finish = delta.finish or self.finish

    def summary(self) -> dict[str, object]:
        """Numbers for an event."""
        phase = "thinking" if self.thinking else "answer"
        return {"tokens": len(self.transcript.tokens), "thinking": self.length, "phase": phase, "finish": self.finish}


class Race:
    """The chains of one task. Sampling that is greedy would make them all equal, so then there is only one.

    A single chain is live: its pieces go out as they are written. `live` may also be set on the one chain that is left.
    With a `figure` every chain knows that of its certainty; a single one has none to compare it with.
    """

    def __init__(
        self, task: Task, engine: Engine, emit: Emit, k: int, *, figure: Callable[[], Figure] | None = None
    ) -> None:
        self.task, self.engine, self.emit = task, engine, emit
        self.warnings: list[str] = []
        if k > 1 and task.sampling.greedy:
            k = 1
            self.warnings.append("greedy sampling makes all chains equal; one chain was run")
        info = engine.info()
        jobs = [replace(task.job(i), stats=figure is not None and k > 1) for i in range(k)]
        make = figure or Mean
        self.lanes = [Lane(i, job, Transcript(info, task.phase), k == 1, make()) for i, job in enumerate(jobs)]
        self._turn = 0

    async def run(self, on_finish: Decide | None = None, on_token: Decide | None = None) -> None:
        """Follow all chains until each has ended or was dropped.

        `on_finish` sees a chain once, when it is done thinking; `on_token` sees it at every delta before that. Raises
        EngineDead, and EngineFailed when no chain is left; one failed chain of several is a warning.
        """
        await together(lambda lane: self._follow(lane, on_finish, on_token), self.lanes)
        failed = [lane.error for lane in self.lanes if lane.error is not None]
        if failed and not self.left():
            raise failed[0]

    def finished(self) -> list[Lane]:
        """Chains that are done thinking and still count, first to finish first."""
        return sorted((lane for lane in self.lanes if lane.finished), key=lambda lane: lane.place or (0, 0))

    def left(self) -> list[Lane]:
        """Chains that neither failed nor were dropped."""
        return [lane for lane in self.lanes if lane.error is None and not lane.dropped]

    async def _follow(self, lane: Lane, on_finish: Decide | None, on_token: Decide | None) -> None:
        try:
            with lane.scope:
                await self.emit(Event("chain.started", lane.index))
                async with self.engine.generate(self._job(lane, watched=bool(on_finish or on_token))) as stream:
                    async for delta in stream:
                        lane.push(delta)
                        await self._judge(lane, on_finish, on_token)
                        if lane.dropped:
                            break
                        await self._report(lane)
        except EngineDead:
            raise
        except EngineFailed as error:
            lane.error = error
            self.warnings.append(f"chain {lane.index} failed: {error}")
            await self.emit(Event("error", lane.index, {"message": str(error)}))
            return
        await self.emit(Event("chain.finished" if lane.finish else "chain.aborted", lane.index, lane.summary()))

    def _job(self, lane: Lane, *, watched: bool) -> Job:
        """What the engine is to do; of chains that nobody decides on before their end, in long deltas."""
        return lane.job if watched else replace(lane.job, interval=self.task.interval)

    async def _judge(self, lane: Lane, on_finish: Decide | None, on_token: Decide | None) -> None:
        if lane.place is None and lane.done_thinking:
            turn = self._turn
            lane.place = (turn, lane.index)
            # Whoever finishes before this turn is over finishes at the same time.
            await checkpoint()
            self._turn = max(self._turn, turn + 1)
            if on_finish is not None:
                on_finish(lane)
        elif lane.place is None and on_token is not None:
            on_token(lane)

    async def _report(self, lane: Lane) -> None:
        written = len(lane.transcript.tokens)
        if lane.live:
            for piece in lane.transcript.take():
                await self.emit(piece)
        elif written >= lane.reported + PROGRESS_TOKENS:
            lane.reported = written
            await self.emit(Event("chain.progress", lane.index, lane.summary()))
