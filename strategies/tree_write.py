"""One proposal, written by the engine: a step up to its blank line, or everything up to the end.

write until a blank line, the end of the sequence, or the cap of a step
a step of white space only: go on, it belongs to the next
a step that closes the thinking: go on to the end of the sequence, so that the answer is part of it
an end of the sequence inside the thinking: a dead end, no solution
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from thinkserve.strategies.engine import Delta, Engine, Finish, Job, Task, Tokens
from thinkserve.strategies.errors import EngineDead, EngineFailed
from thinkserve.strategies.pieces import Transcript, stopped
from thinkserve.strategies.seeds import successor
from thinkserve.strategies.text import Phases
from thinkserve.strategies.tree_node import Node

STEP = "\n\n"
# Jobs for one proposal: blank steps are passed over so often, and one job more writes the answer.
MAX_JOBS = 4
GOES_ON: frozenset[Finish] = frozenset({"stop", "length"})


@dataclass(slots=True)
class Draft:
    """A proposal below `parent` while it is written, for node `number` of `chain`. `generated` is final in the end.

    `terminal`: it completes the solution; `dead`: it has come to its end inside its thinking, without an answer.
    """

    parent: Node
    seed: int | None
    number: int
    chain: int
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list[tuple[tuple[int, float], ...]])
    generated: int = 0
    finish: Finish = "stop"
    terminal: bool = False
    dead: bool = False
    error: EngineFailed | None = None

    def take(self, delta: Delta) -> None:
        """Append what the engine wrote."""
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.top += delta.top
        self.finish = delta.finish or self.finish

    @property
    def own(self) -> Delta:
        """All of it in one."""
        return Delta(tuple(self.tokens), tuple(self.logprobs), tuple(self.top))


@dataclass(frozen=True, slots=True)
class Allowance:
    """Tokens for one proposal: `step` until the blank line, `total` for everything; `step` None: no step, to the end.

    With `room`, thinking is ended so early that so many tokens are left for the answer.
    """

    step: int | None
    total: int
    room: int | None = None


class Writer:
    """Writes proposals for one task; `logprobs`: ask for log-probabilities even if the task does not want them."""

    def __init__(self, task: Task, engine: Engine, *, logprobs: bool = False) -> None:
        self._task, self._engine = task, engine
        self._info = engine.info()
        self._logprobs = 0 if logprobs and task.logprobs is None else task.logprobs

    async def write(self, draft: Draft, before: Tokens, allowance: Allowance) -> None:
        """Write the draft behind `before`, the tokens of its parent's path. A failure is noted, EngineDead raised."""
        chain = Transcript(self._info, self._task.phase)
        chain.push(Delta(before))
        phases = chain.phases
        closed, step = phases.closed, allowance.step
        most = min(allowance.total, draft.parent.left)
        try:
            for number in range(MAX_JOBS):
                room = min(most, most if step is None else step) - len(draft.tokens)
                if room <= 0:
                    break
                job = self._job(draft, number, before, room, step)
                text = await self._read(
                    draft, replace(job, thinking_budget=self._thinking(phases, allowance, room)), chain
                )
                if self._ended(draft, text, step, chain) or draft.finish not in GOES_ON:
                    break
                if phases.closed and not closed:
                    step = None
                elif draft.finish == "length" or self._engine.decode(draft.tokens).strip():
                    break
        except EngineDead:
            raise
        except EngineFailed as error:
            draft.error = error

    def _job(self, draft: Draft, number: int, before: Tokens, room: int, step: int | None) -> Job:
        return replace(
            self._task.job(),
            prompt=self._task.prompt + before + tuple(draft.tokens),
            written=len(before) + len(draft.tokens),
            max_tokens=room,
            # Indices from 0 on are those of its children.
            seed=successor(draft.seed, -number) if number else draft.seed,
            stop=() if step is None else (STEP,),
            logprobs=self._logprobs,
            interval=self._task.interval,
            chain=draft.chain,
        )

    def _thinking(self, phases: Phases, allowance: Allowance, room: int) -> int | None:
        """What is left of the thinking budget, less what the answer is to have."""
        if phases.closed:
            return None
        left = phases.left(self._task.thinking_budget)
        undecided = self._info.reasons and self._task.phase is None and not phases.opened
        if allowance.room is None or not (phases.phase == "thinking" or undecided):
            return left
        return min(room if left is None else left, max(0, room - allowance.room))

    async def _read(self, draft: Draft, job: Job, chain: Transcript) -> str:
        """Run a job to its end; what it wrote as text."""
        start, stream = len(draft.tokens), None
        try:
            async with self._engine.generate(job) as stream:
                async for delta in stream:
                    draft.take(delta)
                    chain.push(Delta(delta.tokens))
        finally:
            # The count is final only here, after the block.
            draft.generated += 0 if stream is None else stream.generated
        return self._engine.decode(draft.tokens[start:])

    def _ended(self, draft: Draft, text: str, step: int | None, chain: Transcript) -> bool:
        """Whether nothing follows: by the end token or a stop string of the caller's, not by a blank line."""
        last = bool(draft.tokens) and draft.tokens[-1] in self._info.eos
        last = last or stopped(chain, self._task, self._engine)
        ended = draft.finish == "stop" and (last or step is None or STEP not in text)
        draft.dead = ended and chain.phases.phase == "thinking"
        draft.terminal = ended and not draft.dead
        return ended
