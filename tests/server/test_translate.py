"""From a body to a Plan: what is honoured, what is cut with a warning, what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from thinkserve.server.choice import Choice
from thinkserve.server.errors import ApiError, body, from_exception
from thinkserve.server.json_body import parse
from thinkserve.server.needs import check_roles
from thinkserve.server.plan import Plan, Rendered, ServedModel
from thinkserve.server.protocol import REFUSED, ChatRequest, parse_chat
from thinkserve.server.settings import Settings
from thinkserve.server.translate import check_supports, to_plan, to_stream_mode
from thinkserve.server.vectors import VectorRegistry
from thinkserve.strategies import registry
from thinkserve.strategies.engine import Engine, ModelInfo, Phase, Role, Sampling
from thinkserve.strategies.errors import BadOptions, ReasoningError
from thinkserve.strategies.registry import Supports
from thinkserve.strategies.testing import ScriptedEngine

INFO = ModelInfo("models/arith-small", context=4096, vocab_size=512, eos=(0,), think_open=(1,), think_close=(2,))
DEFAULTS = Sampling(temperature=0.7, top_p=0.95)
USER = {"role": "user", "content": "1+1"}


@dataclass
class FakeBackend:
    """A model whose template writes one token per character of the contents, and opens thinking unless told not to."""

    info: ModelInfo = INFO
    defaults: Sampling = DEFAULTS
    kv_tokens: int = 65536
    alive: bool = True
    vectors: VectorRegistry | None = None
    guides: bool = False
    obedient: bool = True
    seen: list[Mapping[str, Any]] = field(default_factory=list)

    def engine(self, *_: Any, **__: Any) -> Engine:
        return ScriptedEngine(["ok"], info=self.info)

    async def render(
        self, messages: Sequence[Mapping[str, Any]], *, thinking: bool | None = None, **_: Any
    ) -> Rendered:
        self.seen = list(messages)
        if messages[-1]["role"] == "assistant":
            raise BadOptions("the conversation must not end with the assistant")
        size = sum(len(message["content"]) for message in messages)
        phase: Phase = "answer" if thinking is False and self.obedient else "thinking"
        return Rendered((5,) * size, phase)

    @property
    def roles(self) -> Mapping[Role, ServedModel]:
        return {"target": self}

    async def check(self) -> None: ...

    async def aclose(self) -> None: ...


@dataclass
class Serving:
    settings: Settings = field(default_factory=Settings)
    backend: FakeBackend = field(default_factory=FakeBackend)


def planned(extra: Mapping[str, Any] = {}, headers: Mapping[str, str] = {}, serving: Serving | None = None) -> Plan:
    chat = parse_chat({"model": "arith-small", "messages": [USER], **extra})
    return anyio.run(to_plan, chat, Headers(headers), serving or Serving(), "req_1", "salt")


def refusal(extra: Mapping[str, Any] = {}, headers: Mapping[str, str] = {}, serving: Serving | None = None) -> ApiError:
    with pytest.raises((ApiError, ReasoningError)) as caught:
        planned(extra, headers, serving)
    return from_exception(caught.value, "req_1")


def test_a_bare_request_takes_the_models_defaults_and_the_whole_context() -> None:
    """Sampling of the generation config, all tokens that are left, no seed: the engine draws as it likes."""
    plan = planned()
    assert plan.task.sampling == DEFAULTS
    assert plan.task.max_tokens == 4096 - 3
    assert plan.task.thinking_budget is None
    assert (plan.strategy.id, plan.salt, plan.timeout_s, plan.warnings) == ("single", "salt", 570.0, ())
    assert plan.task.seed is None


def test_every_sampling_field_reaches_the_task() -> None:
    """Nothing is dropped on the way."""
    wish = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "presence_penalty": 0.25, "frequency_penalty": -1,
        "repetition_penalty": 1.5,
    }  # fmt: skip
    plan = planned({**wish, "logit_bias": {"7": -100, "3": 2.5}, "seed": 42, "logprobs": True, "top_logprobs": 3})
    assert plan.task.sampling == Sampling(**wish, logit_bias=((3, 2.5), (7, -100.0)))  # type: ignore[arg-type]
    assert (plan.task.seed, plan.task.logprobs) == (42, 3)
    assert planned({"top_k": -1}).task.sampling.top_k == 0
    assert planned({"logprobs": True}).task.logprobs == 0


def test_a_temperature_just_above_zero_is_raised_with_a_warning() -> None:
    """Zero itself stays greedy."""
    plan = planned({"temperature": 1e-12})
    assert plan.task.sampling.temperature == 0.01
    assert "temperature" in plan.warnings[0]
    assert planned({"temperature": 0}).task.sampling.greedy


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_token_limit_is_per_chain_and_cut_to_the_context(name: str) -> None:
    """Both names; cutting is reported."""
    assert planned({name: 100}).task.max_tokens == 100
    assert planned({name: 4093}).warnings == ()
    plan = planned({name: 5000})
    assert plan.task.max_tokens == 4093
    assert "5000" in plan.warnings[0]


@pytest.mark.parametrize(("size", "fits"), [(4095, True), (4096, False), (4097, False), (400_000, False)])
def test_a_prompt_must_leave_room_for_one_token(size: int, fits: bool) -> None:
    """Otherwise 400 with both numbers."""
    extra = {"messages": [{"role": "user", "content": "x" * size}]}
    if fits:
        assert planned(extra).task.max_tokens == 4096 - size
    else:
        error = refusal(extra)
        assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
        assert str(size) in error.message
        assert "4096" in error.message


def test_chains_and_tokens_are_bounded_by_the_operator() -> None:
    """Both the number of chains and their product with the tokens; the limit is in the text."""
    few = Serving(Settings(max_chains=4))
    assert "4" in refusal({"strategy": "majority"}, serving=few).message
    small = Serving(Settings(max_request_tokens=800))
    assert "800" in refusal({"strategy": "majority", "max_tokens": 101}, serving=small).message
    assert planned({"strategy": "majority", "max_tokens": 100}, serving=small).warnings == ()


def test_an_unbounded_request_is_fitted_to_the_operators_limit() -> None:
    """The caller named no number, so a smaller one breaks no promise."""
    plan = planned({"strategy": "majority"}, serving=Serving(Settings(max_request_tokens=800)))
    assert plan.task.max_tokens == 100
    assert "800" in plan.warnings[0]


def test_the_total_ceiling_is_the_callers_within_the_operators() -> None:
    """It also lifts the product limit, which it makes redundant."""
    small = Serving(Settings(max_request_tokens=800))
    ceiling = {"strategy": {"name": "majority", "max_total_tokens": 500}}
    plan = planned({**ceiling, "max_tokens": 400}, serving=small)
    assert (plan.task.max_total_tokens, plan.task.max_tokens) == (500, 400)
    assert planned(serving=small).task.max_total_tokens == 800


@pytest.mark.parametrize(
    ("extra", "several"),
    [
        ({}, True),
        ({"stream": True}, False),
        ({"stop": ["x"]}, False),
        ({"logprobs": True}, False),
        ({"max_tokens": 9, "strategy": {"name": "majority", "params": {"k": 4}, "max_total_tokens": 36}}, True),
        ({"max_tokens": 9, "strategy": {"name": "majority", "params": {"k": 4}, "max_total_tokens": 35}}, False),
    ],
)
def test_tokens_are_handed_on_together_where_nobody_looks_at_each(extra: dict[str, Any], several: bool) -> None:
    """No client that reads along, no stop string, no log-probabilities, no ceiling that chains share."""
    assert several == (planned(extra).task.interval > 1)


def test_turning_thinking_off_starts_in_the_answer_or_closes_thinking_at_once() -> None:
    """Templates without the switch still obey."""
    assert planned({"enable_thinking": False}).task.phase == "answer"
    stubborn = Serving(backend=FakeBackend(obedient=False))
    task = planned({"enable_thinking": False}, serving=stubborn).task
    assert (task.phase, task.thinking_budget) == ("thinking", 0)


def test_the_shorter_of_body_and_header_timeout_counts_and_both_are_bounded() -> None:
    """A billion seconds is an hour."""
    body = {"strategy": {"name": "single", "timeout_s": 30}}
    assert planned(body, {"X-Request-Timeout-Ms": "1500"}).timeout_s == 1.5
    assert planned(body, {"X-Request-Timeout-Ms": "60000"}).timeout_s == 30
    assert planned({"strategy": {"name": "single", "timeout_s": 1e9}}).timeout_s == 3600


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "x", "", "9" * 20, "²"])
def test_a_bad_timeout_header_is_refused(value: str) -> None:
    """Only a positive number of milliseconds."""
    assert refusal(headers={"X-Request-Timeout-Ms": value}).param == "X-Request-Timeout-Ms"


def test_seeds_in_both_places_must_agree() -> None:
    """Strategy seed and request seed are one thing."""
    assert planned({"seed": 7, "strategy": {"name": "single", "seed": 7}}).task.seed == 7
    assert refusal({"seed": 7, "strategy": {"name": "single", "seed": 8}}).code == "conflicting_parameters"


def test_thoughts_can_be_left_out_under_two_names() -> None:
    """vLLM's and OpenRouter's; they must not contradict each other."""
    assert planned().include_reasoning
    assert not planned({"include_reasoning": False}).include_reasoning
    assert not planned({"reasoning": {"exclude": True}}).include_reasoning
    assert refusal({"include_reasoning": True, "reasoning": {"exclude": True}}).code == "conflicting_parameters"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"temperature": 0, "strategy": "majority"}, "temperature"),
        ({"logit_bias": {"3": 1}, "strategy": "majority"}, "logit_bias"),
        ({"strategy": {"name": "single", "trace": "full"}}, "strategy.trace"),
        ({"strategy": {"name": "single", "stream": "leader"}}, "strategy.stream"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"512": 1}}, "logit_bias.512"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ],
)
def test_what_does_not_go_with_the_strategy_or_the_model_is_refused(extra: dict[str, Any], param: str) -> None:
    """Rather than ignored."""
    error = refusal(extra)
    assert (error.status, error.param) == (400, param)


@pytest.mark.parametrize("extra", [{"logprobs": True}, {"seed": 1}, {"strategy": {"name": "single", "seed": 1}}])
def test_what_a_strategy_does_not_support_is_refused_by_name(extra: dict[str, Any]) -> None:
    """A strategy declares it; the edge enforces it."""
    entry = replace(registry.get("single"), supports=Supports(logprobs=False, seed=False))
    chat = parse_chat({"model": "arith-small", "messages": [USER], **extra})
    with pytest.raises(ApiError) as caught:
        check_supports(chat, Choice(entry, entry.options(), "strategy"), DEFAULTS)
    assert (caught.value.code, caught.value.param in {"logprobs", "seed"}) == ("unsupported_parameter", True)


def test_a_strategy_streams_as_asked_or_in_the_first_way_it_can() -> None:
    """`winner` where there is one."""
    single = registry.get("single")
    asked = parse_chat({"model": "m", "messages": [USER], "strategy": {"name": "single", "stream": "none"}})
    silent = parse_chat({"model": "m", "messages": [USER]})
    assert to_stream_mode(asked, single) == "none"
    assert to_stream_mode(silent, single) == "winner"
    assert to_stream_mode(silent, replace(single, supports=Supports(stream=("leader",)))) == "leader"


def test_a_strategy_whose_model_is_not_configured_is_unavailable() -> None:
    """Refused before anything runs, with the role that is missing."""
    entry = replace(registry.get("single"), roles=("target", "reward"))
    with pytest.raises(ApiError, match="reward") as caught:
        check_roles(entry, FakeBackend())
    assert (caught.value.status, caught.value.code) == (400, "strategy_unavailable")


def test_template_errors_are_the_clients_and_point_at_the_messages() -> None:
    """What the chat template refuses is a 400."""
    error = refusal({"messages": [USER, {"role": "assistant", "content": "2"}]})
    assert (error.status, error.param) == (400, "messages")


def test_messages_reach_the_template_in_its_own_terms() -> None:
    """Developer is system, parts are joined, thoughts stand under both names."""
    serving = Serving()
    history = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "why"},
        {"role": "tool", "content": "42", "tool_call_id": "t1"},
        USER,
    ]
    planned({"messages": history}, serving=serving)
    assert serving.backend.seen == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c", "reasoning": "why", "reasoning_content": "why"},
        {"role": "tool", "content": "42", "tool_call_id": "t1"},
        USER,
    ]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64) + 1, 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*ChatRequest.model_fields, *REFUSED, "user", "zzz"])
PARTLY_RIGHT = st.sampled_from([
    "single", "majority", {"name": "majority", "params": {"k": 2}}, {"name": "short-m-at-k"}, {"effort": "low"}, "low",
    True, 1, 0.5, [USER], ["x"], {"include_usage": True}, {"type": "enabled"}, {"enable_thinking": False}, {"1": 1}, -1,
])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(extra=st.dictionaries(NAMES, PARTLY_RIGHT | VALUES, max_size=5), header=st.text(max_size=20))
def test_any_body_becomes_a_plan_or_a_client_error(extra: dict[str, Any], header: str) -> None:
    """Nothing a client sends is a server error, and every refusal can be written as JSON."""
    raw = json.dumps({"model": "arith-small", "messages": [USER], **extra}).encode()

    async def edge() -> Plan:
        headers = Headers(raw=[(b"x-reasoning-strategy", header.encode("latin-1", "replace"))] if header else [])
        return await to_plan(parse_chat(parse(raw)), headers, Serving(), "req_1", None)

    try:
        outcome: Plan | ApiError = anyio.run(edge)
    except (ApiError, ReasoningError) as exc:
        outcome = from_exception(exc, "req_1")
        json.dumps(body(outcome)).encode()
    assert isinstance(outcome, Plan) or 400 <= outcome.status < 500
