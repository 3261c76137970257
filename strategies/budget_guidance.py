"""budget-guidance: thinking that comes to its end at about a given length, guided line by line (arXiv:2506.13752).

    B = budget
    for the first token and each token after a line break, while thinking:
        alpha_v, lambda_v = predictor(states of the last position)          for every next token v
        r_v = P(log(tokens left after v + 1) <= log(B + 1)),  a Gamma distribution's
        draw from p_v * r_v, normalised                                     instead of p_v
    after every token: B = max(B - 1, 1)
    after budget * (1 + slack) thinking tokens: force the closing tag, begin the answer with the lead-in

The last line is not in the paper, where nothing ends a chain that does not end itself. The loop runs inside the engine
(the control Guide); the predictor belongs to the model.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from pydantic import Field

from thinkserve.strategies.controls import Guide
from thinkserve.strategies.engine import Answer, Chain, Control, Emit, Engine, Event, Finish, Job, Task, Tokens
from thinkserve.strategies.errors import BadOptions
from thinkserve.strategies.pieces import Transcript, injected, write
from thinkserve.strategies.registry import Options, Supports, strategy
from thinkserve.strategies.single import STOPPED_BY


class GuidanceOptions(Options):
    """Parameters of budget guidance."""

    budget: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Thinking tokens to aim at; left out, the request's thinking budget, which must then be given.",
        examples=[200],
    )
    slack: float = Field(
        default=0.25, ge=0, le=10, description="How far beyond the budget, as a share of it, thinking may go."
    )
    hard: bool = Field(
        default=True, description="End thinking there; never later than the request's own thinking budget."
    )
    lead_in: str = Field(
        default="\n\nThe answer is", max_length=200, description="How the answer begins where the end was forced."
    )

    def controls(self) -> tuple[Control, ...]:
        """The guide towards the strategy's own budget; without one it is the request's that counts."""
        return () if self.budget is None else (Guide(self.budget),)


@strategy(
    "budget-guidance",
    title="Budget guidance",
    options=GuidanceOptions,
    reference="arXiv:2506.13752",
    supports=Supports(over=True),
    needs=("guidance",),
)
async def run(task: Task, engine: Engine, emit: Emit, options: GuidanceOptions) -> Answer:
    """One chain whose thinking is guided towards a length, and ended there if need be."""
    budget = options.budget or task.thinking_budget
    if budget is None:
        raise BadOptions("Budget guidance needs a budget: its own or the request's thinking budget.", "budget")
    end = hard_end(budget, task, options)
    job = replace(task.job(), controls=(Guide(max(1, budget)),), thinking_budget=end)
    lead_in = engine.encode(options.lead_in)
    transcript = Transcript(engine.info(), task.phase)
    async with engine.chain(job) as chain:
        await emit(Event("chain.started", 0))
        finish = await _write(chain, job, transcript, emit, until=engine.info().think_close)
        if finish == "stop" and transcript.phases.closed and not transcript.answer:
            if transcript.phases.length == end and len(transcript.tokens) + len(lead_in) < job.max_tokens:
                await emit(Event("budget.forced", 0, {"thinking": end}))
                chain.inject(lead_in)
                await write(injected(lead_in, job.logprobs), transcript, emit)
            finish = await _write(chain, job, transcript, emit)
    await emit(Event("chain.finished", 0, {"tokens": len(transcript.tokens), "finish": finish}))
    return Answer(tuple(transcript.tokens), finish, stopped_by=STOPPED_BY.get(finish, "all_done"))


def hard_end(budget: int, task: Task, options: GuidanceOptions) -> int | None:
    """After how many thinking tokens the end is forced: at the strategy's or the request's end, or never (None)."""
    ends = [] if task.thinking_budget is None else [task.thinking_budget]
    if options.hard:
        # 100 tokens and a tenth are 110: the product's last digits are not meant.
        ends.append(ceil(round(budget * (1 + options.slack), 6)))
    return min(ends, default=None)


async def _write(chain: Chain, job: Job, transcript: Transcript, emit: Emit, until: Tokens = ()) -> Finish:
    """One segment, emitted as it is written."""
    finish: Finish = "stop"
    async with chain.segment(job.max_tokens - len(transcript.tokens), until) as stream:
        async for delta in stream:
            finish = delta.finish or finish
            await write(delta, transcript, emit)
    return finish
