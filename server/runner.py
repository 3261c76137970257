"""One request at work: the strategy on a metered, limited engine, until it has decided or must be cut off.

Whatever happens - an answer, an error, a client that left - usage is counted and one line is logged, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from time import monotonic

from anyio import CancelScope, current_time

from thinkserve.server.answer_stops import AnswerStops
from thinkserve.server.errors import NO_RETRY, ApiError, draining, from_exception, leaves, retry_after
from thinkserve.server.leader import Leader
from thinkserve.server.limits import LimitedEngine
from thinkserve.server.meter import FINISHED, MeteredEngine, Tally
from thinkserve.server.metrics import ChainEnd, Metrics, RequestOutcome
from thinkserve.server.plan import Backend, Log, Outcome, Plan, Usage
from thinkserve.server.request_log import RequestLog
from thinkserve.server.steered import ControlledEngine
from thinkserve.strategies.engine import Answer, Emit, Engine, Event, EventType, Piece
from thinkserve.strategies.modifiers import layered

# After its deadline a strategy has this long to decide with what it has.
GRACE_S = 1.5
# What a summary tells: what was done to a chain and what decided, not how far everybody is.
LOGGED: frozenset[EventType] = frozenset(
    {"takeover", "verifier", "budget.forced", "steer.applied", "vote", "winner", "error"}
)
OUTCOMES: dict[str, RequestOutcome] = {
    "deadline_exceeded": "deadline", "draining": "aborted", "engine_unavailable": "error", "overloaded": "overload",
}  # fmt: skip


class Runner:
    """Runs requests and knows those that are at work."""

    def __init__(self, backend: Backend, metrics: Metrics, log: RequestLog) -> None:
        self._backend = backend
        self._metrics = metrics
        self._log = log
        self._live: set[Execution] = set()
        self._aborted = False

    @property
    def live(self) -> int:
        """How many requests are at work."""
        return len(self._live)

    def open(self, plan: Plan, client: Mapping[str, object] = {}) -> Execution:
        """A request, ready to run; `client` is what the log shall say about who asked."""
        engine = self._backend.engine(plan.request_id, plan.salt)
        return Execution(plan, engine, client, self._metrics)

    def decide(self) -> None:
        """Ask all requests at work to answer with what they have."""
        for execution in self._live:
            execution.decide()

    def abort(self) -> None:
        """Cut all requests off, those that are yet to come, too; clients are told that the server is shutting down."""
        self._aborted = True
        for execution in self._live:
            execution.abort()

    async def run(self, execution: Execution, emit: Emit) -> Outcome:
        """The strategy's decision, accounted for. Raises what the strategy raised (never a group), or ApiError."""
        outcome: RequestOutcome = "aborted"
        if self._aborted:
            execution.abort()
        self._live.add(execution)
        try:
            answer = await execution.decision(emit)
            outcome = "deadline" if answer.stopped_by == "deadline" else "ok"
            return Outcome(answer, execution.usage(), execution.log)
        except Exception as error:
            told = from_exception(error, execution.plan.request_id)
            outcome = OUTCOMES.get(told.code, "client_error" if told.status < 500 else "error")
            raise
        finally:
            self._live.discard(execution)
            self._account(execution, outcome)

    def _account(self, execution: Execution, outcome: RequestOutcome) -> None:
        usage, strategy = execution.usage(), execution.plan.strategy.id
        self._metrics.request(strategy, outcome, usage.wall_ms / 1000)
        self._metrics.usage(strategy, usage)
        self._metrics.chains(strategy, _ends(execution.meter.chains, outcome))
        self._log.request(execution.plan, usage, outcome, execution.client)


class Execution:
    """One request. `texts` decodes for it; `meter` counts for it while it runs and afterwards.

    `cause` is what to tell the client if it ends without an answer, where that is not its own deadline.
    """

    def __init__(self, plan: Plan, engine: Engine, client: Mapping[str, object], metrics: Metrics) -> None:
        self.plan = plan
        self.client = client
        self.texts = engine
        steered = ControlledEngine(engine, plan.controls) if plan.controls else engine
        self._limits = LimitedEngine(steered, plan.task.max_total_tokens, plan.timeout_s)
        stopping = AnswerStops(self._limits, plan.task) if plan.task.stop else self._limits
        self.meter = MeteredEngine(stopping, metrics)
        self._scope = CancelScope()
        self.cause: ApiError | None = None
        self._started = monotonic()
        self._emitted = _Emitted()
        # Above the meter: what a modifier puts in is not generated.
        self._engine, self._modified = layered(self.meter, plan.task, self._emitted, plan.over)

    @property
    def log(self) -> Log:
        """What was done to the completion and why it was chosen, up to now."""
        return self._emitted.log

    def status(self) -> str:
        """Where the request stands, for people."""
        seconds = monotonic() - self._started
        return f"{len(self.meter.chains)} chains, {self.meter.finished} finished, {seconds:.1f}s"

    def usage(self) -> Usage:
        """What was spent up to now."""
        meter, out, generated = self.meter, self._emitted, self.meter.generated
        by_role, scored = meter.by_role(), meter.scored
        # Tokens of ours in the completion (a cue, the words of a forced end of thinking) were not generated.
        winner = meter.drawn(len(self.plan.task.prompt), out.tokens)
        return Usage(
            prompt_tokens=len(self.plan.task.prompt),
            cached_tokens=min(meter.cached, len(self.plan.task.prompt)),
            completion_tokens=generated,
            winner_tokens=winner,
            injected_tokens=len(out.tokens) - winner,
            answer_tokens=min(out.answer, winner),
            chains_started=len(meter.chains),
            chains_finished=meter.finished,
            chains_aborted=len(meter.chains) - meter.finished,
            wall_ms=(monotonic() - self._started) * 1000,
            ttft_ms=None if out.first is None else (out.first - self._started) * 1000,
            draft_tokens=by_role.get("guide", 0),
            prm_tokens=scored.tokens - scored.cached,
            prm_passes=scored.passes,
            verifier_calls=meter.jobs["verifier"],
            verifier_tokens=by_role.get("verifier", 0),
            cache_hit_ratio=meter.hit_ratio,
        )

    def decide(self) -> None:
        """End all streams as at the deadline, by the server's will: who gets no answer may ask another one."""
        self.cause = draining(retry_after())
        self._limits.end("deadline")
        self._scope.deadline = min(self._scope.deadline, current_time() + GRACE_S)

    def abort(self) -> None:
        """Cut the request off."""
        self.cause = draining(NO_RETRY)
        self._scope.cancel()

    async def decision(self, emit: Emit) -> Answer:
        """The strategy's answer; TimeoutError when it does not decide within the grace after its deadline."""
        plan, engine, self._emitted.emit = self.plan, self._engine, emit
        if plan.stream_mode == "leader":
            engine = leader = Leader(engine, plan.task, emit)
            self._emitted.emit = leader.commit
        if plan.timeout_s is not None:
            self._scope.deadline = current_time() + plan.timeout_s + GRACE_S
        try:
            with self._limits, self._scope:
                answer = await plan.strategy.run(plan.task, engine, self._emitted, plan.options)
                warnings = (warning for each in self._modified for warning in each.warnings)
                return replace(answer, warnings=(*answer.warnings, *warnings))
        except BaseExceptionGroup as group:
            raise _leading(group) from group
        raise self.cause or TimeoutError


class _Emitted:
    """Hands on what the strategy emits, keeps the committed tokens and the first events that a summary tells of."""

    def __init__(self) -> None:
        self.emit: Emit | None = None
        self.tokens: list[int] = []
        self.answer = 0
        self.first: float | None = None
        self.log = Log()

    async def __call__(self, item: Piece | Event) -> None:
        if isinstance(item, Piece):
            if self.first is None:
                self.first = monotonic()
            self.tokens += item.tokens
            if item.phase == "answer":
                self.answer += len(item.tokens)
        elif item.type in LOGGED:
            self.log.note(item)
        if self.emit is not None:
            await self.emit(item)


def usable(outcome: Outcome) -> bool:
    """Whether there is something to show: all but what a deadline cut off before the answer had begun."""
    return outcome.answer.finish != "deadline" or outcome.usage.answer_tokens > 0


def _leading(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that stands for a group: the mildest as clients see them."""
    return min(leaves(group), key=lambda leaf: from_exception(leaf, "").status)


def _ends(chains: list[Tally], outcome: RequestOutcome) -> Iterator[tuple[ChainEnd, int]]:
    """How each chain ended; of an answered request one chain that came to its end has won."""
    won = outcome not in {"ok", "deadline"}
    for chain in chains:
        end: ChainEnd
        if chain.finish is None:
            end = "error" if chain.failed else "aborted"
        elif chain.finish == "length" or chain.finish not in FINISHED:
            end = "length"
        else:
            end, won = ("lost" if won else "won"), True
        yield end, chain.generated
