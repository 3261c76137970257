"""The JSON of answers, streamed or not, has the shapes that are published, and its numbers add up."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from thinkserve.server import wire_out
from thinkserve.server.plan import Outcome, Plan, Usage
from thinkserve.server.protocol import REFUSED, ChatRequest, parse_chat
from thinkserve.server.text_out import TextOut
from thinkserve.server.wire_types import Chunk, Completion, UsageReport
from thinkserve.strategies import registry
from thinkserve.strategies.engine import Answer, Event, Finish, Piece, Task
from thinkserve.strategies.testing import ScriptedEngine

USAGE = Usage(
    prompt_tokens=212, cached_tokens=16, completion_tokens=15402, winner_tokens=1882, answer_tokens=9, chains_started=8,
    chains_finished=3, chains_aborted=5, wall_ms=1234.56, ttft_ms=None,
)  # fmt: skip
RACED = Answer((7, 8), "stop", winner=5, stopped_by="m_reached", reason="2 of 3 agree", votes={"42": 2, "41": 1})


def plan(strategy: str = "short-m-at-k", **extra: Any) -> Plan:
    entry = registry.get(strategy)
    return Plan("req_019a", "m:race", Task(prompt=(5,), max_tokens=10), entry, entry.options(), **extra)


def chat(**extra: Any) -> ChatRequest:
    return parse_chat({"model": "m", "messages": [{"role": "user", "content": "x"}], **extra})


def text(thoughts: str, answer: str, for_plan: Plan) -> TextOut:
    engine = ScriptedEngine([])
    out = TextOut(engine, for_plan)
    for phase, part in (("thinking", thoughts), ("answer", answer)):
        tokens = engine.encode(part)
        out.push(Piece(phase, tokens, (-0.5,) * len(tokens)))  # type: ignore[arg-type]
    out.flush()
    return out


def valid(kind: Any, value: object) -> dict[str, Any]:
    """The value as a client would read it, checked against the published schema, unknown keys included."""
    read: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    shaped = TypeAdapter(kind).validate_python(read, strict=True)
    assert shaped == read
    return read


def test_a_completion_has_openais_shape_and_both_names_of_the_thoughts() -> None:
    """`reasoning` and `reasoning_content` are the same text, `content` holds none of it."""
    race = plan()
    body = valid(Completion, wire_out.completion(race, chat(), Outcome(RACED, USAGE), text("why", "42", race), 1000))
    assert (body["id"], body["object"], body["created"], body["model"]) == (
        "chatcmpl-019a",
        "chat.completion",
        1000,
        "m:race",
    )
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant", "content": "42", "refusal": None, "reasoning": "why", "reasoning_content": "why",
    }  # fmt: skip
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)


def test_usage_names_other_models_only_when_they_did_something() -> None:
    """A request of one model, without words of ours, looks as it always did."""
    alone = valid(UsageReport, wire_out.usage(plan(), USAGE, RACED))["strategy"]
    helped = replace(
        USAGE,
        injected_tokens=5,
        draft_tokens=40,
        prm_tokens=0,
        prm_passes=3,
        verifier_calls=2,
        verifier_tokens=2,
        cache_hit_ratio=1 / 3,
    )
    spent = valid(UsageReport, wire_out.usage(plan(), helped, RACED))["strategy"]

    assert {
        "injected_tokens": 5, "draft_tokens": 40, "prm_tokens": 0, "prm_passes": 3, "verifier_calls": 2,
        "verifier_tokens": 2, "cache_hit_ratio": 0.3333,
    } == {name: value for name, value in spent.items() if name not in alone}  # fmt: skip


def test_usage_counts_every_token_and_says_where_they_went() -> None:
    """completion - reasoning = visible answer; winner + wasted = completion; the report repeats the decision."""
    body = valid(UsageReport, wire_out.usage(plan(), USAGE, RACED))
    assert body["total_tokens"] == body["prompt_tokens"] + body["completion_tokens"] == 212 + 15402
    assert body["completion_tokens"] - body["completion_tokens_details"]["reasoning_tokens"] == 9
    spent = body["strategy"]
    assert spent["winner_completion_tokens"] + spent["wasted_tokens"] == 15402
    assert (spent["name"], spent["winner"], spent["stopped_by"], spent["trace_id"]) == (
        "short-m-at-k", 5, "m_reached", "req_019a",
    )  # fmt: skip
    assert spent["chains"] == {"started": 8, "finished": 3, "aborted": 5}


def test_an_operator_may_count_the_winner_alone() -> None:
    """Some agents compact on total_tokens; the waste stays visible in `strategy`."""
    body = wire_out.usage(plan(usage_scope="winner"), USAGE, RACED)
    assert body["completion_tokens"] == 1882
    assert body["completion_tokens"] - body["completion_tokens_details"]["reasoning_tokens"] == 9
    assert body["strategy"]["wasted_tokens"] == 13520


@pytest.mark.parametrize(
    ("finish", "stopped", "expected"),
    [("stop", False, "stop"), ("length", False, "length"), ("ceiling", False, "length"), ("deadline", False, "length"),
     ("repetition", False, "length"), ("length", True, "stop")],
)  # fmt: skip
def test_the_finish_reason_stays_within_openais_words(finish: Finish, stopped: bool, expected: str) -> None:
    """The exact cause is in the report."""
    assert wire_out.finish_reason(Answer((), finish), stopped=stopped) == expected


def test_the_report_names_strategy_parameters_decision_and_warnings() -> None:
    """What was effective, not what was asked for."""
    race = plan(warnings=("cut",), preset="race")
    body = wire_out.completion(race, chat(), Outcome(RACED, USAGE), text("", "42", race))
    assert body["strategy"] == {
        "name": "short-m-at-k", "version": "1", "preset": "race", "params": race.options.model_dump(mode="json"),
        "decision": {"winner": 5, "reason": "2 of 3 agree", "votes": {"42": 2, "41": 1}}, "stopped_by": "m_reached",
        "warnings": ["cut"], "trace_id": "req_019a",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "decided", "present"),
    [
        ({}, {}, False),
        ({"strategy": "single"}, {}, True),
        ({}, {"warnings": ("temperature raised",)}, True),
        ({}, {"preset": "solo"}, True),
    ],
)
def test_a_plain_single_answer_carries_no_report_unless_there_is_a_reason(
    asked: dict[str, Any], decided: dict[str, Any], present: bool
) -> None:
    """Ordinary chat looks like ordinary chat; a warning is never lost."""
    single = plan("single", **decided)
    outcome = Outcome(Answer((), "stop"), USAGE)
    assert ("strategy" in wire_out.completion(single, chat(**asked), outcome, text("", "x", single))) is present
    assert ("strategy" in wire_out.Chunks(single, chat(**asked)).finish(outcome)) is present


def test_a_stream_is_role_text_finish_and_usage_in_openais_shape() -> None:
    """Every chunk but the last has exactly one choice; usage is null until then; all share one id."""
    streaming = chat(stream=True, stream_options={"include_usage": True})
    chunks = wire_out.Chunks(plan(), streaming, 1000)
    event = Event("chain.finished", 5, {"tokens": 1873})
    sent = [
        valid(Chunk, chunk)
        for chunk in (
            chunks.role(), chunks.progress(event, 41, 12.34), chunks.reasoning("why"), chunks.content("42"),
            chunks.finish(Outcome(RACED, USAGE)), chunks.usage(USAGE),
        )
    ]  # fmt: skip
    assert {chunk["id"] for chunk in sent} == {"chatcmpl-019a"}
    assert [chunk["choices"][0]["delta"] for chunk in sent[:-1]] == [
        {"role": "assistant", "content": ""}, {}, {"reasoning": "why", "reasoning_content": "why"}, {"content": "42"},
        {},
    ]  # fmt: skip
    assert [chunk["choices"][0]["finish_reason"] for chunk in sent[:-1]] == [None, None, None, None, "stop"]
    assert [chunk["usage"] for chunk in sent[:-1]] == [None] * 5
    assert sent[1]["strategy_event"] == {
        "seq": 41,
        "t_ms": 12.3,
        "type": "chain.finished",
        "chain": 5,
        "data": {"tokens": 1873},
    }
    assert sent[4]["strategy"]["decision"]["winner"] == 5
    assert sent[5]["choices"] == []
    assert sent[5]["usage"]["strategy"]["winner"] == 5


def test_without_include_usage_no_chunk_mentions_it() -> None:
    """As OpenAI does."""
    assert "usage" not in wire_out.Chunks(plan(), chat(stream=True)).role()


def test_logprobs_are_those_of_the_answer_and_go_with_its_chunks() -> None:
    """Entries spell the content."""
    single = plan("single")
    single = Plan("req_1", "m", Task((5,), 10, logprobs=0), single.strategy, single.options)
    out = text("why", "42", single)
    asked = chat(logprobs=True)
    body = valid(Completion, wire_out.completion(single, asked, Outcome(Answer((), "stop"), USAGE), out))
    assert [entry["token"] for entry in body["choices"][0]["logprobs"]["content"]] == ["4", "2"]
    chunk = valid(Chunk, wire_out.Chunks(single, asked).content("42", out.take_logprobs()))
    assert chunk["choices"][0]["logprobs"] == body["choices"][0]["logprobs"]


def test_headers_name_the_effective_strategy_and_what_was_ignored() -> None:
    """In a form that can be sent back; odd names are counted, not echoed."""
    headers = wire_out.headers(plan(), chat(zzz=1, **{"b\r\nad": 2}))
    assert headers["X-Reasoning-Strategy"].startswith("short-m-at-k; k=")
    assert headers["X-Ignored-Params"] == "zzz, 1 more"
    assert "X-Ignored-Params" not in wire_out.headers(plan(), chat())


@given(names=st.lists(st.text(min_size=1), max_size=30, unique=True))
def test_any_ignored_names_make_a_legal_header(names: list[str]) -> None:
    """Printable ASCII and of bounded length."""
    extra = {name: 1 for name in names if name not in {*ChatRequest.model_fields, *REFUSED}}
    value = wire_out.headers(plan(), chat(**extra)).get("X-Ignored-Params", "")
    assert value.isascii()
    assert value == "" or value.isprintable()
    assert len(value) < 2500


@given(
    data=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers(), inner, max_size=3),
            max_leaves=5,
        ),
    )
)
def test_event_data_of_any_kind_can_be_sent(data: dict[str, object]) -> None:
    """A strategy's NaN or bytes must not break a stream."""
    json.dumps(wire_out.Chunks(plan(), chat()).progress(Event("vote", None, data), 1, 0.0), allow_nan=False)
