"""Somebody's own strategy, as a user would write it: this file must type check, it is not run."""

from __future__ import annotations

from pydantic import Field

from thinkserve.strategies.engine import Answer, Delta, Emit, Engine, Event, Finish, Path, Piece, Score, Task
from thinkserve.strategies.registry import Options, strategy
from thinkserve.strategies.testing import Recorder, ScriptedEngine, play
from thinkserve.strategies.text import answer_of


class RetryOptions(Options):
    """Parameters of retry."""

    attempts: int = Field(default=3, ge=1, le=8, description="How often to try.")


@strategy("retry", title="retry", options=RetryOptions, aliases=("again",))
async def retry(task: Task, engine: Engine, emit: Emit, options: RetryOptions) -> Answer:
    """Try again until there is an answer."""
    tokens: tuple[int, ...] = ()
    finish: Finish = "stop"
    for attempt in range(options.attempts):
        await emit(Event("chain.started", attempt, {"of": options.attempts}))
        tokens = ()
        async with engine.generate(task.job(attempt)) as stream:
            async for delta in stream:
                tokens += delta.tokens
                finish = delta.finish or finish
        if answer_of(engine.decode(tokens)) is not None:
            break
    await emit(Piece("answer", tokens))
    return Answer(tokens, finish, winner=attempt, warnings=("tried again",) if attempt else ())


@strategy("twice", options=Options, roles=("target", "reward"))
async def twice(task: Task, engine: Engine, emit: Emit, options: Options) -> Answer:
    """Write a draft, judge it, go on from it."""
    async with engine.chain(task.job()) as chain:
        async with chain.segment(64, until=engine.encode("\n")) as draft:
            deltas: list[Delta] = [delta async for delta in draft]
        scores: list[Score] = await engine.score(task.question, [Path((engine.decode(chain.tokens),))])
        if scores[0].rewards[0] < 0.5:
            chain.inject(engine.encode("Wait, "))
        async with chain.segment(64) as rest:
            deltas += [delta async for delta in rest]
        await emit(Piece("answer", chain.tokens))
        return Answer(chain.tokens, deltas[-1].finish or "stop")


async def try_it() -> tuple[Answer, Recorder]:
    """The shipped fake is an Engine, and running a strategy on it is one line."""
    engine: Engine = ScriptedEngine(["no", r"\boxed{4}"])
    return await play("retry", engine, Task(engine.encode("2+2"), max_tokens=64), attempts=2)
