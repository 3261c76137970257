"""ThinkBrake: at the end of a sentence, stop thinking when closing is almost the best step (arXiv:2510.00546).

    write one chain
    while it thinks, after every sentence and every line:
        m = ln p(best token other than the closing tag) - ln p(closing tag)    of the next step, from the raw logits
        if m <= tau: stop here, append the closing tag, let it answer
    the answer is written on the same tokens

p is the model's own, before temperature and truncation, so m is a difference of two logits. The token drawn in the step
that brakes is dropped. A sentence ends with `.`, `?` or `!` before white space, a line with a line break (the paper
leaves that open). Never before `min_think` thinking tokens, and only if there is room for an answer.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from thinkserve.strategies.chain import continued
from thinkserve.strategies.confidence import close_margin
from thinkserve.strategies.engine import Answer, Delta, Emit, Engine, Event, Finish, Job, Task
from thinkserve.strategies.errors import Unsupported
from thinkserve.strategies.pieces import Transcript, injected, write
from thinkserve.strategies.registry import Options, Supports, strategy
from thinkserve.strategies.sentences import Sentences
from thinkserve.strategies.single import STOPPED_BY

_CUT: frozenset[Finish | None] = frozenset({"ceiling", "deadline"})


class ThinkBrakeOptions(Options):
    """Parameters of ThinkBrake."""

    tau: float = Field(
        default=0.1, ge=0, le=10, allow_inf_nan=False, description="Brake at a margin of at most so many nats."
    )
    min_think: int = Field(default=0, ge=0, description="Thinking tokens before the first possible brake.")


@strategy(
    "think-brake",
    title="ThinkBrake",
    options=ThinkBrakeOptions,
    reference="arXiv:2510.00546",
    supports=Supports(over=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: ThinkBrakeOptions) -> Answer:
    """One chain that stops thinking at the end of a sentence where closing is about as likely as going on."""
    close = engine.info().think_close
    if len(close) > 1:
        raise Unsupported("ThinkBrake needs a closing tag that is a single token.", "strategy")
    job = replace(task.job(), stats=bool(close) and task.phase != "answer")
    chain = _Chain(engine, task, emit, options)
    await emit(Event("chain.started", 0))
    finish = await chain.follow(job)
    reason = ""
    if chain.margin is not None:
        written = tuple(chain.transcript.tokens)
        reason = f"thinking stopped after {len(written)} tokens: margin {chain.margin:.3f}"
        await emit(Event("budget.forced", 0, {"tokens": len(written), "margin": chain.margin}))
        await chain.take(injected(close, job.logprobs))
        room = task.max_tokens - len(written) - len(close)
        finish = await chain.follow(continued(job, written + close, max_tokens=room, thinking_budget=None, stats=False))
    tokens = tuple(chain.transcript.tokens)
    await emit(Event("chain.finished", 0, {"tokens": len(tokens), "finish": finish}))
    return Answer(tokens, finish, stopped_by=STOPPED_BY.get(finish, "all_done"), reason=reason)


class _Chain:
    """What has been written, emitted as it comes, and the margin at which it was stopped if it was."""

    def __init__(self, engine: Engine, task: Task, emit: Emit, options: ThinkBrakeOptions) -> None:
        self.transcript = Transcript(engine.info(), task.phase)
        self.margin: float | None = None
        self._engine, self._emit, self._options = engine, emit, options
        self._sentences = Sentences(engine)
        self._most = min(task.max_tokens, engine.info().context - len(task.prompt))

    async def follow(self, job: Job) -> Finish:
        """Read a job to its end, or to where its thinking is to stop."""
        finish: Finish = "stop"
        async with self._engine.generate(job) as stream:
            async for delta in stream:
                finish = delta.finish or finish
                for step in _steps(delta):
                    self.margin = self._brake(step)
                    if self.margin is not None:
                        return finish
                    await self.take(step)
        return finish

    async def take(self, delta: Delta) -> None:
        """Append tokens and emit what they settle."""
        await write(delta, self.transcript, self._emit)

    def _brake(self, step: Delta) -> float | None:
        """The margin of this step if thinking is to stop before it."""
        phases = self.transcript.phases
        ended = self._sentences.ended(step.tokens)
        if not step.stats or phases.phase != "thinking" or step.tokens == self._engine.info().think_close:
            return None
        early = phases.length < self._options.min_think
        late = len(self.transcript.tokens) + 1 >= self._most or step.finish in _CUT
        margin = close_margin(step.stats[0])
        return margin if ended and not early and not late and margin <= self._options.tau else None


def _steps(delta: Delta) -> list[Delta]:
    """The delta token by token; how it ends stays with the last."""
    last = len(delta.tokens) - 1
    cuts = [slice(at, at + 1) for at in range(last + 1)] or [slice(0)]
    return [
        replace(
            delta,
            tokens=delta.tokens[cut],
            logprobs=delta.logprobs[cut],
            top=delta.top[cut],
            finish=delta.finish if at >= last else None,
            stats=delta.stats[cut],
        )
        for at, cut in enumerate(cuts)
    ]
