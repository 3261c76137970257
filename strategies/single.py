"""One chain, streamed as it is written: what every other strategy is measured against."""

from __future__ import annotations

from dataclasses import replace

from thinkserve.strategies.engine import Answer, Control, Emit, Engine, Event, Finish, StoppedBy, Task
from thinkserve.strategies.pieces import Transcript, write
from thinkserve.strategies.registry import Options, Supports, strategy


class SingleOptions(Options):
    """No parameters."""


@strategy("single", options=SingleOptions, supports=Supports(over=True))
async def run(task: Task, engine: Engine, emit: Emit, options: SingleOptions) -> Answer:
    """One chain, streamed as it is written."""
    return await stream_chain(task, engine, emit)


async def stream_chain(task: Task, engine: Engine, emit: Emit, controls: tuple[Control, ...] = ()) -> Answer:
    """The task's chain 0, every delta emitted at once; for strategies that do not look at what it writes."""
    transcript = Transcript(engine.info(), task.phase)
    job = replace(task.job(), interval=task.interval, controls=controls)
    finish: Finish = "stop"
    await emit(Event("chain.started", 0))
    async with engine.generate(job) as stream:
        async for delta in stream:
            finish = delta.finish or finish
            await write(delta, transcript, emit)
    await emit(Event("chain.finished", 0, {"tokens": len(transcript.tokens), "finish": finish}))
    return Answer(tuple(transcript.tokens), finish, stopped_by=STOPPED_BY.get(finish, "all_done"))


STOPPED_BY: dict[Finish, StoppedBy] = {"ceiling": "budget", "deadline": "deadline", "length": "length"}
