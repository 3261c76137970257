"""ScriptedEngine: an Engine that writes scripts instead of running a model; deterministic, instant, shipped for tests.

Text is one token per UTF-8 byte, so 'a' * 7 is seven tokens. `<think>`, `</think>` and `<eos>` in a text stand for the
special tokens; a text script ends with `<eos>` by itself. Streams advance in lockstep: one step gives every live stream
its next token once all of their readers wait; a reader that dawdles is left behind after a few turns of the event loop,
and its unread tokens are counted as on a real engine.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from thinkserve.strategies.chain import ResubmittedChain
from thinkserve.strategies.engine import (
    Answer,
    Chain,
    Detokenizer,
    Engine,
    Event,
    Finish,
    Job,
    ModelInfo,
    Path,
    Phase,
    Piece,
    Role,
    Score,
    Stream,
    Task,
    Tokens,
)
from thinkserve.strategies.errors import EngineFailed, Unsupported
from thinkserve.strategies.registry import Options, Strategy, get
from thinkserve.strategies.scripted import (
    FIRST_BYTE,
    ScriptedStats,
    ScriptedStream,
    byte_tokens,
    plain_stats,
    text_bytes,
)
from thinkserve.strategies.seeds import successor

SCRIPTED = ModelInfo(
    "scripted", context=1 << 20, vocab_size=FIRST_BYTE + 256, eos=(0,), think_open=(1,), think_close=(2,)
)
# Turns of the event loop that a step waits for readers who are busy elsewhere.
PATIENCE = 16
_MARK = re.compile(r"(</?think>|<eos>)")

Script = str | Sequence[int]
Scripts = Sequence[Script] | Callable[[Job, int], Script]


class ScriptedEngine:
    """Writes `scripts[i % n]` for the i-th job, or `scripts(job, i)`; a job that continues an earlier one goes on.

    `fail[i] = (n, error)` raises `error` in place of token n of job i. `pace[i]` is how many steps a token of job i
    takes, `tick` how many seconds a step, `burst` how many tokens a step gives. `ceiling` and `deadline` end every
    stream after that many tokens in all or steps. `overrun` tokens are still sampled for a job that is aborted.
    `rate` gives the reward of the last of some steps. `stats(i, n)` are the statistics of token n of script i.
    """

    def __init__(
        self,
        scripts: Scripts,
        *,
        info: ModelInfo = SCRIPTED,
        roles: tuple[Role, ...] = ("target",),
        fail: Mapping[int, tuple[int, EngineFailed]] = {},
        pace: Mapping[int, int] = {},
        tick: float = 0.0,
        burst: int = 1,
        ceiling: int | None = None,
        deadline: int | None = None,
        overrun: int = 0,
        rate: Callable[[tuple[str, ...]], float] = lambda steps: 0.0,
        stats: ScriptedStats = plain_stats,
    ) -> None:
        self._scripts, self._info, self._roles, self._fail, self._pace = scripts, info, roles, fail, pace
        self._tick, self._burst, self._ceiling, self._deadline, self._overrun = tick, burst, ceiling, deadline, overrun
        self._rate, self._stats = rate, stats
        self._indices = 0
        self.steps = 0
        self.history: list[ScriptedStream] = []
        self.scored: list[tuple[str, tuple[Path, ...]]] = []
        self.live: list[ScriptedStream] = []

    def __repr__(self) -> str:
        finished = sum(stream.finish is not None for stream in self.history)
        aborted = sum(stream.aborted for stream in self.history)
        failed = sum(stream.error is not None for stream in self.history)
        counts = f"{len(self.live)} live, {finished} finished, {aborted} aborted, {failed} failed"
        return f"<ScriptedEngine {len(self.history)} jobs: {counts} | {self.generated} tokens in {self.steps} steps>"

    @property
    def generated(self) -> int:
        """Tokens sampled for all jobs, those never read included."""
        return sum(stream.generated for stream in self.history)

    def info(self, role: Role = "target") -> ModelInfo:
        """The facts given at construction. Raises Unsupported for a role that was not."""
        if role not in self._roles:
            raise Unsupported(f"no model serves the role {role!r}", "role")
        return self._info

    def encode(self, text: str, role: Role = "target") -> Tokens:
        """One token per byte; the three tags become the model's special tokens."""
        info = self.info(role)
        marks = {"<think>": info.think_open, "</think>": info.think_close, "<eos>": info.eos[:1]}
        parts = _MARK.split(text)
        return tuple(token for part in parts for token in marks.get(part) or byte_tokens(part))

    def decode(self, tokens: Sequence[int], role: Role = "target") -> str:
        """Text of the byte tokens; all others are special and left out."""
        return text_bytes(tokens).decode("utf-8", "replace")

    def detokenizer(self, role: Role = "target") -> Detokenizer:
        """A decoder that holds back unfinished characters."""
        return _ByteDecoder()

    def generate(self, job: Job) -> AbstractAsyncContextManager[Stream]:
        """Write the next script, or go on with that of the job that this one continues (role, its seed or the next)."""
        return self._stream(job, None)

    @asynccontextmanager
    async def chain(self, job: Job) -> AsyncIterator[Chain]:
        """A chain by resubmission; all of its segments write one script."""
        index = self._take_index()
        yield ResubmittedChain(lambda segment: self._stream(segment, index), job, self.info(job.role))

    async def render(self, messages: Sequence[Mapping[str, str]], role: Role = "target") -> Tokens:
        """The lines `role: text` as tokens, thinking closed."""
        self.info(role)
        await checkpoint()
        return self.encode(
            "".join(f"{each['role']}: {each['content']}\n" for each in messages) + "<think></think>", role
        )

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        """What `rate` says of the path up to each wanted step; a pass costs a token per character that is new."""
        self.info(role)
        await checkpoint()
        self.scored.append((question, tuple(paths)))
        return [self._score(path) for path in paths]

    def _score(self, path: Path) -> Score:
        ends = range(path.known + 1, len(path.steps) + 1)
        known = len("".join(path.steps[: path.known]))
        return Score(tuple(self._rate(path.steps[:end]) for end in ends), len("".join(path.steps)), known)

    def step(self) -> None:
        """Give every live stream its next token(s), read or not."""
        self.steps += 1
        for stream in list(self.live):
            if self.steps % self._pace.get(stream.index, 1) == 0:
                stream.advance(self._burst)
            if self._ceiling is not None and self.generated >= self._ceiling:
                self._end_all("ceiling")
        if self._deadline is not None and self.steps >= self._deadline:
            self._end_all("deadline")

    async def wait(self, stream: ScriptedStream) -> None:
        """Return when `stream` has something to read; steps once all readers wait, or patience is over."""
        if stream.pending:
            await checkpoint()
        while not stream.pending:
            seen = self.steps
            if self._tick:
                await anyio.sleep(self._tick)
            for _ in range(0 if self._tick else PATIENCE):
                await checkpoint()
                stream.waited += 1
                # Who has waited a whole turn has also had the time to leave, had it been cancelled.
                if self.steps != seen or all(other.waited for other in self.live):
                    break
            if self.steps == seen:
                self.step()

    @asynccontextmanager
    async def _stream(self, job: Job, index: int | None) -> AsyncIterator[ScriptedStream]:
        self.info(job.role)
        origin = self._origin(job, index)
        if index is None:
            index = origin.index if origin else self._take_index()
        stream = ScriptedStream(self, self._info, job, self._script(job, index), index=index, origin=origin)
        stream.failure, stream.stats = self._fail.get(index), self._stats
        self.history.append(stream)
        self.live.append(stream)
        try:
            yield stream
        finally:
            if stream in self.live:
                stream.aborted = True
                stream.advance(self._overrun)
                self.retire(stream)

    def retire(self, stream: ScriptedStream) -> None:
        """Take a stream that has ended out of the step; no more tokens come."""
        if stream in self.live:
            self.live.remove(stream)

    def _take_index(self) -> int:
        self._indices += 1
        return self._indices - 1

    def _script(self, job: Job, index: int) -> Tokens:
        script = self._scripts(job, index) if callable(self._scripts) else self._scripts[index % len(self._scripts)]
        if not isinstance(script, str):
            return tuple(script)
        return self.encode(script if script.endswith("<eos>") else script + "<eos>")

    def _origin(self, job: Job, index: int | None) -> ScriptedStream | None:
        def continues(old: ScriptedStream) -> bool:
            known = job.seed is not None and job.seed in (old.job.seed, successor(old.job.seed))
            same = known if index is None else old.index == index
            longer = len(job.prompt) > len(old.job.prompt) and job.prompt[: len(old.job.prompt)] == old.job.prompt
            return same and longer and job.role == old.job.role

        return max(filter(continues, self.history), key=lambda old: old.matched(job.prompt), default=None)

    def _end_all(self, finish: Finish) -> None:
        for stream in list(self.live):
            stream.end(finish)


class Recorder:
    """An Emit that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.events: list[Event] = []

    async def __call__(self, item: Piece | Event) -> None:
        """Keep the item; a cancellation point, as a real emit is."""
        await checkpoint()
        if isinstance(item, Piece):
            self.pieces.append(item)
        else:
            self.events.append(item)

    @property
    def tokens(self) -> Tokens:
        """All pieces in one."""
        return tuple(token for piece in self.pieces for token in piece.tokens)

    def tokens_of(self, phase: Phase) -> Tokens:
        """The tokens of one phase."""
        return tuple(token for piece in self.pieces if piece.phase == phase for token in piece.tokens)


def example(entry: Strategy, **given: Any) -> Options:
    """Options that a strategy runs with: `given`, of fields that name examples their first, else defaults."""
    fields = entry.options.model_fields.items()
    return entry.options(**{name: field.examples[0] for name, field in fields if field.examples} | given)


async def play(name: str, engine: Engine, task: Task, **options: Any) -> tuple[Answer, Recorder]:
    """Run a registered strategy as a server would; what it answered and what it emitted."""
    entry = get(name)
    recorder = Recorder()
    return await entry.run(task, engine, recorder, entry.options(**options)), recorder


class _ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Sequence[int]) -> str:
        return self._decoder.decode(text_bytes(tokens))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)
