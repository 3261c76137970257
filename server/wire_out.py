"""From what came out of a request to the JSON that clients read: completions, chunks, usage, the strategy's report.

Pure functions of plan, request and outcome. `usage` counts every token of every chain; `reasoning_tokens` is all of it
that is not the visible answer. `logprobs` cover the visible answer. A request cut off by a ceiling, by its deadline or
by a loop finishes with "length"; the report says which. `usage.strategy` repeats name, winner, stopped_by and trace_id
because several client libraries keep nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from thinkserve.server.choice import HEADER, Choice
from thinkserve.server.plan import Outcome, Plan, Usage
from thinkserve.server.protocol import ChatRequest
from thinkserve.server.text_out import TextOut
from thinkserve.server.trace_types import TraceEvent
from thinkserve.server.wire_types import (
    Chunk,
    ChunkDelta,
    Completion,
    FinishReason,
    Logprobs,
    StrategyReport,
    StrategyUsage,
    TokenLogprob,
    UsageReport,
)
from thinkserve.strategies.controls import Steer
from thinkserve.strategies.engine import Answer, Event


def completion(
    plan: Plan, chat: ChatRequest, outcome: Outcome, text: TextOut, created: int | None = None
) -> Completion:
    """The body of a plain response; `text` has been flushed."""
    thoughts = text.reasoning or None
    body: Completion = {
        "id": completion_id(plan),
        "object": "chat.completion",
        "created": int(time.time()) if created is None else created,
        "model": plan.model,
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": text.content,
                    "refusal": None,
                    "reasoning": thoughts,
                    "reasoning_content": thoughts,
                },
                "logprobs": logprobs(text.logprobs) if chat.logprobs else None,
                "finish_reason": finish_reason(outcome.answer, stopped=text.stopped is not None),
            }
        ],
        "usage": usage(plan, outcome.usage, outcome.answer),
    }
    if wants_report(plan, chat, outcome.answer):
        body["strategy"] = traced_report(plan, chat, outcome)
    return body


class Chunks:
    """The chunks of one stream; all share id, model and time.

    Order: `role`, then text and progress, then `finish`, then `usage` if the client asked for it.
    """

    def __init__(self, plan: Plan, chat: ChatRequest, created: int | None = None) -> None:
        self._plan = plan
        self._chat = chat
        self._answer: Answer | None = None
        self._counts = bool(chat.stream_options and chat.stream_options.include_usage)
        self._id = completion_id(plan)
        self._created = int(time.time()) if created is None else created

    def role(self) -> Chunk:
        """The first chunk, sent at once."""
        return self._chunk({"role": "assistant", "content": ""})

    def reasoning(self, text: str) -> Chunk:
        """More thoughts, under both customary names."""
        return self._chunk({"reasoning": text, "reasoning_content": text})

    def content(self, text: str, tokens: list[TokenLogprob] | None = None) -> Chunk:
        """More of the answer, with the entries of the tokens it is made of (`TextOut.take_logprobs`)."""
        return self._chunk({"content": text}, entries=tokens)

    def progress(self, event: Event, seq: int, t_ms: float) -> Chunk:
        """An empty delta that carries an event of the race."""
        chunk = self._chunk({})
        chunk["strategy_event"] = {"seq": seq, "t_ms": round(t_ms, 1), **traced(event)}
        return chunk

    def finish(self, outcome: Outcome, *, stopped: bool = False) -> Chunk:
        """The last chunk with a choice; `stopped` when a stop string ended the answer."""
        self._answer = outcome.answer
        chunk = self._chunk({}, finish_reason(outcome.answer, stopped=stopped))
        if wants_report(self._plan, self._chat, outcome.answer):
            chunk["strategy"] = traced_report(self._plan, self._chat, outcome)
        return chunk

    def usage(self, counts: Usage) -> Chunk:
        """The chunk without choices that ends a stream with `include_usage`."""
        chunk = self._chunk({})
        chunk["choices"] = []
        chunk["usage"] = usage(self._plan, counts, self._answer)
        return chunk

    def _chunk(
        self, delta: ChunkDelta, finish: FinishReason | None = None, entries: list[TokenLogprob] | None = None
    ) -> Chunk:
        chunk: Chunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._plan.model,
            "choices": [
                {
                    "index": 0,
                    "delta": delta,
                    "logprobs": logprobs(entries) if entries else None,
                    "finish_reason": finish,
                }
            ],
        }
        if self._counts:
            chunk["usage"] = None
        return chunk


def usage(plan: Plan, counts: Usage, answer: Answer | None) -> UsageReport:
    """The usage object; `answer` is None when the request ended before there was one."""
    completion = counts.completion_tokens if plan.usage_scope == "all" else counts.winner_tokens
    report: UsageReport = {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": counts.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": max(completion - counts.answer_tokens, 0)},
        "strategy": {
            "name": plan.strategy.id,
            "winner": answer.winner if answer else None,
            "stopped_by": answer.stopped_by if answer else None,
            "trace_id": plan.request_id,
            "winner_completion_tokens": counts.winner_tokens,
            "wasted_tokens": counts.wasted_tokens,
            "chains": {
                "started": counts.chains_started,
                "finished": counts.chains_finished,
                "aborted": counts.chains_aborted,
            },
            "wall_ms": round(counts.wall_ms, 1),
            "ttft_ms": None if counts.ttft_ms is None else round(counts.ttft_ms, 1),
        },
    }
    _add_helpers(report["strategy"], counts)
    return report


def _add_helpers(spent: StrategyUsage, counts: Usage) -> None:
    """What others than the target did, we and the other models, if they did anything."""
    if counts.injected_tokens:
        spent["injected_tokens"] = counts.injected_tokens
    if counts.draft_tokens:
        spent["draft_tokens"] = counts.draft_tokens
    if counts.prm_passes:
        spent["prm_tokens"], spent["prm_passes"] = counts.prm_tokens, counts.prm_passes
    if counts.verifier_calls:
        spent["verifier_calls"], spent["verifier_tokens"] = counts.verifier_calls, counts.verifier_tokens
    if counts.cache_hit_ratio is not None:
        spent["cache_hit_ratio"] = round(counts.cache_hit_ratio, 4)


def traced_report(plan: Plan, chat: ChatRequest, outcome: Outcome) -> StrategyReport:
    """The response's `strategy` object, with the log for those who ask for a summary."""
    written = report(plan, outcome.answer)
    if chat.choice is not None and chat.choice.trace == "summary":
        written["trace"] = {"events": [traced(each) for each in outcome.log.events], "omitted": outcome.log.omitted}
    return written


def traced(event: Event) -> TraceEvent:
    """An event as JSON."""
    return {"type": event.type, "chain": event.chain, "data": {key: jsonable(item) for key, item in event.data.items()}}


def report(plan: Plan, answer: Answer) -> StrategyReport:
    """The decision and what led to it."""
    written: StrategyReport = {
        "name": plan.strategy.id,
        "version": plan.strategy.version,
        "preset": plan.preset,
        "params": plan.options.model_dump(mode="json"),
        "decision": {"winner": answer.winner, "reason": answer.reason, "votes": dict(answer.votes)},
        "stopped_by": answer.stopped_by,
        "warnings": [*plan.warnings, *answer.warnings],
        "trace_id": plan.request_id,
    }
    steers = [control for control in plan.controls if isinstance(control, Steer)]
    if steers:
        written["steer"] = [
            {"vector": s.vector, "scale": s.scale, "layers": list(s.layers), "positions": s.positions} for s in steers
        ]
    if plan.over:
        params = [layer.options.model_dump(mode="json") for layer in plan.over]
        written["over"] = [
            {"name": layer.modifier.id, "params": each} for layer, each in zip(plan.over, params, strict=True)
        ]
    return written


def wants_report(plan: Plan, chat: ChatRequest, answer: Answer) -> bool:
    """Whether the report is due: not for a plain `single` that nobody asked about and that went without a warning."""
    asked = plan.asked or chat.strategy is not None or plan.preset is not None
    return asked or plan.strategy.id != "single" or bool(plan.warnings or answer.warnings)


def finish_reason(answer: Answer, *, stopped: bool) -> FinishReason:
    """OpenAI's word for the end of an answer."""
    return "stop" if stopped or answer.finish == "stop" else "length"


def logprobs(tokens: list[TokenLogprob]) -> Logprobs:
    """The logprobs object of a choice."""
    return {"content": tokens, "refusal": None}


def completion_id(plan: Plan) -> str:
    """The id of a completion: the request's, in OpenAI's form."""
    return "chatcmpl-" + plan.request_id.removeprefix("req_")


def headers(plan: Plan, chat: ChatRequest) -> dict[str, str]:
    """Response headers that tell what was decided and what was passed over."""
    out = {HEADER: Choice(plan.strategy, plan.options, "").written()}
    ignored = [name for name in chat.ignored if name.isascii() and name.replace("_", "").replace(".", "").isalnum()]
    if chat.ignored:
        hidden = len(chat.ignored) - len(ignored[:20])
        out["X-Ignored-Params"] = ", ".join([*ignored[:20], *([f"{hidden} more"] if hidden else [])])
    return out


def jsonable(value: object) -> Any:
    """A strategy's event data as plain JSON: numbers that JSON lacks become null, unknown objects their text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): jsonable(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [jsonable(item) for item in value]
    return str(value)
