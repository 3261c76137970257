"""One chain, streamed as it is written: what every other strategy is measured against."""

from __future__ import annotations

from thinkserve.strategies.engine import Answer, Emit, Engine, Event, Finish, Job, Phase, StoppedBy, Task
from thinkserve.strategies.pieces import Transcript, write
from thinkserve.strategies.registry import Options, Supports, strategy


class SingleOptions(Options):
    """No parameters."""


@strategy("single", options=SingleOptions, supports=Supports(over=True))
async def run(task: Task, engine: Engine, emit: Emit, options: SingleOptions) -> Answer:
    """One chain, streamed as it is written."""
    return await stream_chain(task.job(), task.phase, engine, emit)


async def stream_chain(job: Job, phase: Phase | None, engine: Engine, emit: Emit) -> Answer:
    """Run a job as chain 0, every delta emitted at once; for all strategies of one chain."""
    transcript = Transcript(engine.info(), phase)
    finish: Finish = "stop"
    await emit(Event("chain.started", 0))
    async with engine.generate(job) as stream:
        async for delta in stream:
            finish = delta.finish or finish
            await write(delta, transcript, emit)
    await emit(Event("chain.finished", 0, {"tokens": len(transcript.tokens), "finish": finish}))
    return Answer(tuple(transcript.tokens), finish, stopped_by=STOPPED_BY.get(finish, "all_done"))


STOPPED_BY: dict[Finish, StoppedBy] = {"ceiling": "budget", "deadline": "deadline", "length": "length"}
