"""TrimR: a verifier watches a chain think and ends it when its answers agree or will not come (arXiv:2505.17155).

    cut the thinking into thoughts, at paragraphs that turn round ("Wait", "Alternatively", ...)
    of every thought that has ended, in order, beside the decoding:
        does its end state a result?                          ask the verifier; only such thoughts count
        is it the result of the last such thought?            ask again (`compare`); `agree` counts Yes in a row
        agree = M = 2, three results in a row                 overthinking: lead the model to its conclusion (`ending`)
    thinking has used R = half of its tokens, or N = 20 thoughts have ended, and no three results agree
                                                              underthinking: close the thinking by force
    the same block of tokens K = 4 times back to back         repetition: close the thinking by force

A verdict is looked at when the next token comes; one that comes after the end of thinking is dropped, and after an
ending nothing is asked any more. An ending takes effect at the end of the sentence; a model that goes on thinking after
a mild one is closed after `mild_room` tokens. The paper leaves open whether both conditions of underthinking must hold:
`need`. Numbers of tokens that are left out are for contexts from 8192 on, a smaller one has its share.

A thought ends where the next look is announced ("Wait, let me verify that."), and behind such words a model may answer
as if it had doubts. So where a verdict may end the thinking, what comes behind the thought is held back from the reader
until it is there (`HOLD` tokens at most, and never beyond the line), and dropped if it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Literal

import anyio
from anyio import CancelScope, create_task_group
from pydantic import Field, ValidationInfo, field_validator

from thinkserve.strategies.ending import Ending, EndingOptions, Thought
from thinkserve.strategies.engine import Answer, Emit, Engine, Event, Job, Task
from thinkserve.strategies.equivalence import shared
from thinkserve.strategies.errors import LOST, Lost, Unforgiven, leading
from thinkserve.strategies.modifiers import modifier
from thinkserve.strategies.reflection import Words
from thinkserve.strategies.registry import Supports, strategy
from thinkserve.strategies.repetition import detector
from thinkserve.strategies.scale import FULL_CONTEXT, scaled
from thinkserve.strategies.single import stream_chain
from thinkserve.strategies.splice import Modified, Watcher
from thinkserve.strategies.thoughts import MARKERS, Segmenter, excerpt, result
from thinkserve.strategies.verifier import ASK_EXISTS, ASK_SAME, Verifier

LEAD = "**Final Answer**\n\n"
HOLD = 64


class TrimrOptions(EndingOptions):
    """Parameters of TrimR."""

    overthinking: bool = Field(default=True, description="End mildly once results agree.")
    agreements: int = Field(default=2, ge=1, le=64, description="How often in a row a result must be the one before.")
    underthinking: bool = Field(default=True, description="End by force what does not come to results that agree.")
    budget_share: float = Field(default=0.5, gt=0, le=1, description="Share of the thinking budget or of max_tokens.")
    thoughts: int = Field(default=20, ge=1, le=10_000, description="How many thoughts may end without agreement.")
    need: Literal["either", "both"] = Field(default="either", description="Which of these two make underthinking.")
    repetition: bool = Field(default=True, description="End by force what goes in circles.")
    repeats: int = Field(default=4, ge=2, le=64, description="How often in a row the same block is a loop.")
    markers: Words = Field(default=MARKERS, description="Words that begin a new thought after a blank line.")
    patience: int = Field(default=24, ge=0, description="Paragraphs without a marker before each is a thought.")
    excerpt_paragraphs: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="How much of a thought's end is shown; left out, 5, or 2 of a small model.",
    )
    excerpt_tokens: int | None = Field(default=None, ge=8, le=4096, description="And at most; left out, 300 tokens.")
    compare: Literal["ask", "results"] | None = Field(
        default=None,
        description="Are two results the same: ask the verifier, or compare what the excerpts end with. Left out, ask, "
        "or compare those of a small model, which no verifier of its size can.",
    )
    ask_exists: str = Field(default=ASK_EXISTS, max_length=2000, description="With {question} and {excerpt}.")
    ask_same: str = Field(default=ASK_SAME, max_length=2000, description="With {question}, {first} and {second}.")
    margin: float = Field(default=0.0, ge=-20, le=20, allow_inf_nan=False, description="Log-odds that make a Yes.")
    ending: Literal["mild", "forced"] | None = Field(
        default=None, description="How overthinking ends; left out, mildly, or by force with a small model."
    )
    lead: str = Field(default=LEAD, max_length=400, description="Words of a mild ending.")
    mild_room: int | None = Field(
        default=None, ge=1, le=65_536, description="Tokens of thinking after a mild ending; left out, 512."
    )
    on_verifier_error: Literal["continue", "fail"] = Field(
        default="continue", description="If the verifier fails: go on without its verdict, or end with its error."
    )

    @field_validator("ask_exists", "ask_same")
    @classmethod
    def _names_its_excerpts(cls, wording: str, info: ValidationInfo) -> str:
        names = ("{excerpt}",) if info.field_name == "ask_exists" else ("{first}", "{second}")
        if not all(name in wording for name in names):
            raise ValueError(f"the wording must hold {' and '.join(names)}")
        return wording


@modifier("trimr", title="TrimR", options=TrimrOptions, reference="arXiv:2505.17155", roles=("verifier",))
class Trimr(Modified):
    """Ends the thinking of each chain once its results agree, will not come, or it goes in circles."""

    def __init__(self, inner: Engine, task: Task, emit: Emit, options: TrimrOptions) -> None:
        super().__init__(inner, task, emit)
        self.options = options
        self.verifier = Verifier(inner, task.question, options.ask_exists, options.ask_same)

    @asynccontextmanager
    async def follow(self, job: Job) -> AsyncIterator[Watcher]:
        """A watcher, and beside it the one who asks; both end with the chain."""
        watched = _Watched(self, job)
        if watched.over or not (self.options.overthinking or self.options.underthinking):
            yield watched
            return
        try:
            async with create_task_group() as group:
                group.start_soon(watched.verify)
                try:
                    yield watched
                finally:
                    group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            raise leading(errors) from errors


@strategy(
    "trimr",
    title="TrimR",
    options=TrimrOptions,
    reference="arXiv:2505.17155",
    roles=("target", "verifier"),
    supports=Supports(over=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: TrimrOptions) -> Answer:
    """One chain whose thinking ends once its results agree, will not come, or it goes in circles."""
    trimmed = Trimr(engine, task, emit, options)
    answer = await stream_chain(task, trimmed, emit)
    return replace(answer, warnings=(*answer.warnings, *trimmed.warnings))


class _Watched(Thought):
    """One chain: its thoughts, what the verifier said of them, and the three rules."""

    def __init__(self, trimmed: Trimr, job: Job) -> None:
        super().__init__(trimmed, job, trimmed.options.sentence)
        options, context = trimmed.options, self.info.context
        self._trimmed, self._options = trimmed, options
        self._segments = Segmenter(options.markers, options.patience)
        self._repetition = detector(context, None, None, options.repeats)
        small = context < FULL_CONTEXT
        self._paragraphs = options.excerpt_paragraphs or (2 if small else 5)
        self._tokens = options.excerpt_tokens or scaled(300, context)
        # The embedded family goes on verifying after any words of ours.
        self._kind = options.ending or ("forced" if small else "mild")
        self._compare = options.compare or ("results" if small else "ask")
        self._mild_room, self._hold = options.mild_room or scaled(512, context), scaled(HOLD, context)
        budget = job.max_tokens if job.thinking_budget is None else min(job.thinking_budget, job.max_tokens)
        self._most = options.budget_share * budget
        self._thoughts = self._judged = self._agree = 0
        self._error: Lost | None = None
        self._scope = CancelScope()
        self._queue: deque[tuple[int, tuple[str, ...]]] = deque()
        self._arrived = anyio.Event()

    @property
    def _agreed(self) -> bool:
        return self._agree >= self._options.agreements

    def lead(self) -> str:
        """The words that make the model conclude."""
        return self._options.lead

    def take(self, token: int, text: str) -> bool:
        """The rules that need no verifier; and what there is to verify."""
        if self._error is not None:
            raise Unforgiven(self._error)
        options, ended = self._options, self._segments.push(text)
        self._thoughts += len(ended)
        if self.decided or self.began is not None:
            if self.length - (self.began or self.length) >= self._mild_room:
                self.end(Ending("overthinking"))
            return self.held > 0
        if options.repetition and self._repetition.push(token):
            self.end(Ending("repetition", at_once=True))
        late = self.length >= self._most, self._thoughts >= options.thoughts
        if options.underthinking and not self._agreed and (all if options.need == "both" else any)(late):
            self.end(Ending("underthinking"))
        if ended:
            self._queue.extend(enumerate(ended, self._thoughts - len(ended) + 1))
            self._arrived.set()
        return options.overthinking and not self._scope.cancel_called and self._holds(text)

    def _holds(self, text: str) -> bool:
        """Whether verdicts that are out may end the thinking before the paragraph at hand."""
        if "\n" in text:
            self.held = 0
        # What is not held from its beginning on is not held at all.
        from_there = self.held > 0 or (self._segments.begun and self.whole)
        out = self._thoughts - self._judged + self._segments.undecided
        return from_there and self._agree + out >= self._options.agreements and self.held < self._hold

    def end(self, ending: Ending) -> None:
        """With the decision, verification is over."""
        super().end(ending)
        self._scope.cancel()

    def close(self) -> None:
        """Thinking is over, and with it verification."""
        super().close()
        self._scope.cancel()

    async def verify(self) -> None:
        """Ask about every thought in order, until there is a decision."""
        last: str | None = None
        with self._scope:
            while True:
                while self._queue:
                    number, thought = self._queue.popleft()
                    try:
                        text = excerpt(thought, self._paragraphs, self._tokens, self._trimmed)
                        exists = await self._trimmed.verifier.states_result(text) > self._options.margin
                        same = await self._same(last, text) if exists and last is not None else None
                    except LOST as error:
                        self._failed(error)
                    else:
                        last = text if exists else last
                        self._judge(number, exists, same)
                    self._judged = number
                self._arrived = anyio.Event()
                await self._arrived.wait()

    async def _same(self, first: str, second: str) -> bool:
        if self._compare == "ask":
            return await self._trimmed.verifier.same_result(first, second) > self._options.margin
        return await shared().equal(result(first), result(second))

    def _judge(self, number: int, exists: bool, same: bool | None) -> None:
        if exists:
            self._agree = self._agree + 1 if same else 0
        told = {"thought": number, "exists": exists, "same": same, "count": self._agree}
        self.tell(Event("verifier", self.job.chain, told))
        if self._agreed and self._options.overthinking:
            self.end(Ending("overthinking", self._kind))

    def _failed(self, error: Lost) -> None:
        if self._options.on_verifier_error == "fail":
            self._error = error
        else:
            self._trimmed.warn(f"the verifier failed: {error}")
