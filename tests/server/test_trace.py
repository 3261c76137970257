"""What a request may hear of its own course: the log of a summary, and how many of its tokens nobody generated."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import TypeAdapter

from thinkserve.server.metrics import Metrics
from thinkserve.server.plan import MOST_LOGGED, Plan
from thinkserve.server.request_log import RequestLog
from thinkserve.server.runner import Runner
from thinkserve.server.testing import ScriptedBackend
from thinkserve.server.wire_types import Completion
from thinkserve.strategies.engine import Answer, Emit, Engine, Event, Job, Piece, Task
from thinkserve.strategies.registry import Options, Strategy
from thinkserve.strategies.testing import Recorder, ScriptedEngine

Serve = Callable[..., Any]
TEXT = "one.\n\nWait, no.\n\nWait, so it is.\n\nall well.</think>It is 7."
SPECULATIVE = {"name": "speculative-thinking", "params": {"n1": 8, "n3": 6, "threshold": 1, "cue": "Hm? "}}


def both(text: str = TEXT) -> ScriptedEngine:
    """Target and guide, who know what they write at every place of a chain; a cue moves nothing."""
    known = ScriptedEngine([""])
    whole, start = (*known.encode(text), 0), len(known.encode("user: hi\n<think>"))

    def script(job: Job, _: int) -> tuple[int, ...]:
        cues = known.decode(job.prompt[start:]).count("Hm? ") * 4
        return whole[len(job.prompt) - start - cues :]

    return ScriptedEngine(script, roles=("target", "guide"))


def takeovers(report: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Position, tokens, kind and label of each."""
    told = [event["data"] for event in report["trace"]["events"] if event["type"] == "takeover"]
    return [(each["position"], each["tokens"], each["kind"], each["label"]) for each in told]


def test_a_summary_tells_who_took_over_where(serve: Serve) -> None:
    """In the report of a plain response, in the published shape; and a cue of ours is told apart in usage."""
    server = serve(both())

    body = server.chat(seed=1, strategy={**SPECULATIVE, "trace": "summary"}).json()

    assert TypeAdapter(Completion).validate_python(body, strict=True) == body
    log, spent = takeovers(body["strategy"]), body["usage"]["strategy"]
    assert [(6, 8, "draft", "reflection"), (21, 6, "recheck", "reflection")] == log[:2]
    assert 0 == body["strategy"]["trace"]["omitted"]
    thought = body["choices"][0]["message"]["reasoning"]
    assert (thought.count("Hm? ") * 4, True) == (spent["injected_tokens"], "Hm? " in thought)
    assert server.engine.generated == body["usage"]["completion_tokens"]
    whole = len(server.engine.encode(TEXT)) + 1
    assert (whole, server.engine.generated - whole) == (spent["winner_completion_tokens"], spent["wasted_tokens"])


def test_a_stream_tells_the_same_at_its_end(serve: Serve) -> None:
    """In the chunk that finishes, without progress having been asked for."""
    plain, streamed = serve(both()), serve(both())
    asked = {**SPECULATIVE, "trace": "summary"}

    body = plain.chat(seed=1, strategy=asked).json()
    lines = streamed.chat(seed=1, strategy=asked, stream=True).text.splitlines()

    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    (report,) = [chunk["strategy"] for chunk in chunks if "strategy" in chunk]
    assert body["strategy"]["trace"] == report["trace"]
    assert not any("strategy_event" in chunk for chunk in chunks)


@pytest.mark.parametrize("trace", [{}, {"trace": "none"}])
def test_without_a_summary_there_is_no_log(serve: Serve, trace: dict[str, str]) -> None:
    """Which is the default."""
    body = serve(both()).chat(seed=1, strategy={**SPECULATIVE, **trace}).json()

    assert "trace" not in body["strategy"]


def test_any_strategy_has_a_log(serve: Serve) -> None:
    """What decided among chains, not how far each of them was."""
    server = serve(ScriptedEngine(["t" * 100 + "</think>It is 7."]))

    body = server.chat(seed=1, strategy={"name": "majority", "params": {"k": 3}, "trace": "summary"}).json()

    kinds = [event["type"] for event in body["strategy"]["trace"]["events"]]
    assert {"vote", "winner"} == set(kinds)
    assert "injected_tokens" not in body["usage"]["strategy"]


def plan_of(run: Any) -> Plan:
    entry = Strategy("mine", "mine", "A strategy of this test.", Options, run)
    return Plan("req_1", "m", Task(prompt=(9,), max_tokens=1000, seed=1), entry, Options())


async def _outcome(run: Any, engine: ScriptedEngine) -> Any:
    runner = Runner(ScriptedBackend(engine), Metrics(), RequestLog(False))
    return await runner.run(runner.open(plan_of(run)), Recorder())


@pytest.mark.anyio
async def test_a_log_has_an_end() -> None:
    """The first entries are kept, the others counted; progress does not crowd them out."""

    async def talkative(task: Task, engine: Engine, emit: Emit, options: Options) -> Answer:
        for number in range(MOST_LOGGED + 5):
            await emit(Event("chain.progress", 0))
            await emit(Event("verifier", 0, {"thought": number}))
        return Answer((), "stop")

    log = (await _outcome(talkative, ScriptedEngine([""]))).log

    assert [*range(MOST_LOGGED)] == [event.data["thought"] for event in log.events]
    assert 5 == log.omitted


@pytest.mark.anyio
async def test_words_of_ours_are_no_models_whoever_puts_them_in() -> None:
    """Wherever they stand; tokens that another chain generated count for it, and are wasted."""
    engine = ScriptedEngine(["abcd", "wxyz"])

    async def pieced(task: Task, engine: Engine, emit: Emit, options: Options) -> Answer:
        tokens: tuple[int, ...] = ()
        for index, ours in enumerate((b"..", b"!")):
            job = Job(task.prompt + tokens, 3, seed=index)
            async with engine.generate(job) as stream:
                tokens += tuple([token async for delta in stream for token in delta.tokens])
            tokens += engine.encode(ours.decode())
        async with engine.generate(Job(task.prompt, 2, seed=7)) as stream:
            async for _ in stream:
                pass
        await emit(Piece("answer", tokens))
        return Answer(tokens, "stop")

    usage = (await _outcome(pieced, engine)).usage

    assert (8, 6, 3) == (usage.completion_tokens, usage.winner_tokens, usage.injected_tokens)
    assert 2 == usage.wasted_tokens
