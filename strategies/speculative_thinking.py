"""Speculative thinking: a large model takes over where a small one turns reflective (arXiv:2504.12329, section 3).

    the guide begins with a few words                                             only of a target that does not reason
    loop, while thinking:
        the target writes up to a blank line
        if it has reflected `threshold` times: write a cue ourselves, the guide goes on for n3 tokens; count anew,
            n3 and threshold grow
        else: the target peeks at the next n1 tokens, the guide drafts n1 for the same place
            a plain statement: the peek is kept, or written anew
            else: the draft is kept; if it reflects, count it; if it sets out to verify, the guide goes on for n2 tokens
    the target writes the rest

A text is labelled by counting words of doubt and of certainty in it, anywhere, also inside other words; as many of both
is doubt. Whether it sets out to verify is asked of what was kept, as in the authors' code (the paper asks it of every
paragraph). Numbers are the code's, n1 = 20, n2 = 125, n3 = 125 (+25 to 200), threshold = 15 (+5 to 30). A context of
less than 8192 tokens has its share of the threshold, which counts over a whole chain, and of n2 and n3 what the shorter
verifications of a small model take, 70 (+14 to 112); n1 is about a sentence, which is no shorter there. Two things save
time: the draft begins while the target peeks, as soon as a word of the peek calls for it, and a peek that was a
statement is kept (drawn anew, as the authors do, it may yet reflect).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from anyio import create_task_group
from pydantic import Field

from thinkserve.strategies.chain import continued
from thinkserve.strategies.engine import Answer, Delta, Emit, Engine, Event, Finish, Job, Role, Task, Tokens
from thinkserve.strategies.errors import LOST, Lost, leading
from thinkserve.strategies.pieces import Transcript, injected, stopped, write
from thinkserve.strategies.reflection import CERTAINTY, DOUBT, VERIFICATION, Label, Lists, hits, label
from thinkserve.strategies.registry import Options, Supports, strategy
from thinkserve.strategies.scale import FULL_CONTEXT, scaled
from thinkserve.strategies.seeds import successor
from thinkserve.strategies.single import STOPPED_BY
from thinkserve.strategies.streams import growing, parted, whole
from thinkserve.strategies.text import before

BLANK = "\n\n"
CUE = "Let me check whether there is a wrong step so far."
Kind = Literal["begin", "draft", "verify", "recheck"]


class SpeculativeOptions(Options):
    """Parameters of speculative thinking; lengths are in tokens, of two defaults the second is a small model's."""

    n1: int | None = Field(default=None, ge=1, le=4096, description="Tokens of a peek and a draft; left out, 20.")
    n2: int | None = Field(default=None, ge=1, le=4096, description="Tokens of a verification; left out, 125 or 70.")
    n3: int | None = Field(default=None, ge=1, le=4096, description="Tokens after a cue, growing; left out, 125 or 70.")
    threshold: int | None = Field(default=None, ge=1, description="Doubts before a cue, growing; left out, 15 or less.")
    begin_with_guide: bool | None = Field(
        default=None, description="Let the guide begin; left out, only if the target does not reason."
    )
    choose_large: bool = Field(
        default=True, description="Keep the guide's draft always; else only where its label is another than the peek's."
    )
    commit_peek: bool = Field(default=True, description="Keep a peek that is a statement instead of drawing it anew.")
    concurrent: bool = Field(
        default=True, description="Draft while the target goes on peeking, as soon as its peek is no mere statement."
    )
    cue: str = Field(default=CUE, max_length=400, description="Written where there was too much reflection.")
    reflection: Lists = Field(default=DOUBT, description="Words of doubt: a list, or lists by language.")
    affirmation: Lists = Field(default=CERTAINTY, description="Words of certainty.")
    verification: Lists = Field(default=VERIFICATION, description="Words that set out to verify.")
    on_guide_error: Literal["continue", "fail"] = Field(
        default="continue", description="If the guide is lost: go on without it, or end with its error."
    )


@strategy(
    "speculative-thinking",
    title="Speculative thinking",
    options=SpeculativeOptions,
    reference="arXiv:2504.12329",
    roles=("target", "guide"),
    supports=Supports(parts=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: SpeculativeOptions) -> Answer:
    """One chain of a small model; a large one writes the turns of its thinking."""
    chain = _Chain(task, engine, emit, options)
    await emit(Event("chain.started", 0))
    finish = await chain.compose()
    tokens = tuple(chain.transcript.tokens)
    await emit(Event("chain.finished", 0, {"tokens": len(tokens), "finish": finish, **chain.written}))
    share = f"{chain.written['guide']} of {len(tokens)} tokens are the guide's"
    stopped_by = STOPPED_BY.get(finish, "all_done")
    return Answer(tokens, finish, stopped_by=stopped_by, reason=share, warnings=tuple(chain.warnings))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths in tokens; n3 and the threshold grow with every cue, by the published share of what they began with."""

    n1: int
    n2: int
    n3: int
    threshold: int
    begin: int

    def after(self, cues: int) -> tuple[int, int]:
        """The n3 and threshold that hold after so many cues."""
        n3 = min(self.n3 + cues * max(1, self.n3 // 5), self.n3 * 8 // 5)
        return n3, min(self.threshold + cues * max(1, self.threshold // 3), self.threshold * 2)


def lengths_of(options: SpeculativeOptions, context: int) -> Lengths:
    """The options' numbers; those left out are the published ones, or for a small context what its model takes."""
    look = 125 if context >= FULL_CONTEXT else 70
    threshold = options.threshold or scaled(15, context)
    return Lengths(options.n1 or 20, options.n2 or look, options.n3 or look, threshold, begin=100)


class _Chain:
    """What has been written, by whom, and how it ended once it has."""

    def __init__(self, task: Task, engine: Engine, emit: Emit, options: SpeculativeOptions) -> None:
        self.transcript = Transcript(engine.info(), task.phase)
        self.written = {"target": 0, "guide": 0, "cue": 0}
        self.warnings: list[str] = []
        self._task, self._engine, self._emit, self._options = task, engine, emit, options
        self._info = engine.info()
        self._most = min(task.max_tokens, self._info.context - len(task.prompt))
        self._lengths = lengths_of(options, self._info.context)
        self._guided = True
        self._finish: Finish | None = None
        self._doubts = self._cues = self._jobs = 0

    @property
    def _room(self) -> int:
        return self._most - len(self.transcript.tokens)

    async def compose(self) -> Finish:
        """Write the whole chain."""
        begins = self._options.begin_with_guide
        if begins or (begins is None and not self._info.reasons):
            await self._take_over("begin", self._job("guide", self._lengths.begin))
        while self._finish is None:
            at_blank = await self._paragraph()
            while at_blank and self._watched():
                at_blank = await self._turn()
        await write(Delta(finish=self._finish), self.transcript, self._emit)
        return self._finish

    async def _paragraph(self) -> bool:
        """The target up to a blank line, or to its end once nobody watches; whether it stands at a blank line."""
        phases, job = self.transcript.phases, self._job("target", self._most)
        may_think = not self._info.reasons or not (phases.closed or self._task.phase == "answer")
        job = replace(job, stop=(BLANK,)) if self._guided and may_think else job
        return BLANK in self._engine.decode(await self._write(job))

    async def _turn(self) -> bool:
        """What follows a blank line; whether the target stands at one again."""
        recheck, threshold = self._lengths.after(self._cues)
        if self._doubts >= threshold:
            await self._recheck(recheck)
            return False
        peek, draft = await self._drafts()
        if draft is None:
            # A statement; or the guide is lost, and the target's own words are all there is.
            keep = self._options.commit_peek or not self._guided or peek.finish in {"ceiling", "deadline"}
            return await self._keep_statement(peek) if keep else False
        kept = peek if not self._options.choose_large and self._label(draft) == self._label(peek) else draft
        await self._keep(kept, "target" if kept is peek else "guide")
        self._doubts += self._label(kept) == "reflection"
        if self._watched() and hits(self._engine.decode(kept.tokens), self._options.verification):
            await self._take_over("verify", self._job("guide", self._lengths.n2))
        return False

    async def _drafts(self) -> tuple[Delta, Delta | None]:
        """The target's peek, and the guide's draft for the same place unless the peek is all that is needed."""
        mine, theirs = self._job("target", self._lengths.n1), self._job("guide", self._lengths.n1)
        peek, asked, drafts = Delta(), False, list[Delta | None]()

        async def ask() -> None:
            drafts.append(await self._ask(theirs))

        try:
            async with create_task_group() as group, self._engine.generate(mine) as stream:
                async for peek in growing(stream):
                    # More words never make it a statement again.
                    if not asked and (self._options.concurrent or peek.finish) and not self._calm(peek):
                        asked = True
                        group.start_soon(ask)
        except BaseExceptionGroup as errors:
            raise leading(errors) from errors
        return peek, drafts[0] if asked else None

    async def _ask(self, job: Job) -> Delta | None:
        """The guide's draft; None if the guide is lost."""
        try:
            async with self._engine.generate(job) as stream:
                return await whole(stream)
        except LOST as error:
            self._lose_guide(error)
            return None

    async def _keep_statement(self, peek: Delta) -> bool:
        """Commit the target's peek up to its first blank line, where it would have stopped; whether there is one."""
        decoder, text, size = self._engine.detokenizer(), "", 0
        # One that closes the thinking has nowhere to stop: a blank line in it may be of a modifier's words.
        closed = before(peek.tokens, self._info.think_close) != peek.tokens
        while size < len(peek.tokens) and (closed or BLANK not in text):
            text += decoder.push(peek.tokens[size : size + 1])
            size += 1
        await self._keep(parted(peek, size)[0], "target")
        return BLANK in text

    async def _keep(self, draft: Delta, by: Role) -> None:
        position = len(self.transcript.tokens)
        await self._commit(draft, by)
        self._end(draft.finish)
        if by == "guide":
            await self._log("draft", position)

    async def _recheck(self, most: int) -> None:
        """Too much reflection: our cue, and the guide goes on from it."""
        cue, left = self._engine.encode(self._options.cue), self._thinking_left()
        if len(cue) < (self._room if left is None else min(left, self._room)):
            await self._commit(injected(cue, self._task.logprobs), "cue")
        await self._take_over("recheck", self._job("guide", most))
        self._doubts, self._cues = 0, self._cues + 1

    async def _take_over(self, kind: Kind, job: Job) -> None:
        """The guide writes, seen by the reader at once."""
        position = len(self.transcript.tokens)
        try:
            await self._write(job)
        except LOST as error:
            self._lose_guide(error)
            self._end(None)
        await self._log(kind, position)

    async def _write(self, job: Job) -> Tokens:
        """Run a job and commit what it writes as it comes."""
        start, finish = len(self.transcript.tokens), None
        async with self._engine.generate(job) as stream:
            async for delta in stream:
                finish = delta.finish or finish
                await self._commit(delta, job.role)
        written = tuple(self.transcript.tokens[start:])
        blank = bool(job.stop) and BLANK in self._engine.decode(written)
        paused = blank and written[-1] not in self._info.eos and not stopped(self.transcript, self._task, self._engine)
        self._end(finish, paused=paused, short=job.role == "target" and len(written) < job.max_tokens)
        return written

    async def _commit(self, delta: Delta, by: Role | Literal["cue"]) -> None:
        self.written[by] += len(delta.tokens)
        # How a job ends is not how the chain ends.
        await write(replace(delta, finish=None), self.transcript, self._emit)

    def _end(self, finish: Finish | None, *, paused: bool = False, short: bool = False) -> None:
        """Take note of how a job ended: `paused` where it is to go on, `short` where it wrote less than it might."""
        if finish not in {None, "stop", "length"} or (finish == "stop" and not paused):
            self._finish = finish
        elif self._room <= 0 or (finish == "length" and short):
            self._finish = "length"

    async def _log(self, kind: Kind, position: int) -> None:
        span = tuple(self.transcript.tokens[position:])
        if span:
            told = {"position": position, "tokens": len(span), "kind": kind, "label": self._label(Delta(span))}
            await self._emit(Event("takeover", 0, told))

    def _lose_guide(self, error: Lost) -> None:
        if self._options.on_guide_error == "fail":
            raise error
        self._guided = False
        self.warnings.append(f"the guide was lost after {len(self.transcript.tokens)} tokens: {error}")

    def _job(self, role: Role, most: int) -> Job:
        """The next tokens of the chain; every job draws random numbers of its own, the first those of `single`."""
        job, number = self._task.job(), self._jobs
        self._jobs += 1
        return continued(
            job,
            tuple(self.transcript.tokens),
            max_tokens=min(most, self._room),
            seed=successor(job.seed, number) if number else job.seed,
            thinking_budget=self._thinking_left(),
            stop_tokens=self._info.eos if role == "guide" else (),
            role=role,
        )

    def _thinking_left(self) -> int | None:
        return self.transcript.phases.left(self._task.thinking_budget)

    def _watched(self) -> bool:
        thinking = not self._info.reasons or self.transcript.phases.phase == "thinking"
        return self._guided and thinking and self._finish is None

    def _calm(self, peek: Delta) -> bool:
        return self._info.reasons and self._label(peek) == "statement"

    def _label(self, delta: Delta) -> Label:
        thought = self._engine.decode(before(delta.tokens, self._info.think_close))
        return label(thought, self._options.reflection, self._options.affirmation)
