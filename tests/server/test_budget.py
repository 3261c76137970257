"""All ways to bound thinking come to one number, and contradictions are errors."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.server.budget import Thinking, ladder, thinking
from thinkserve.server.errors import ApiError
from thinkserve.server.protocol import parse_chat
from thinkserve.server.settings import Effort
from thinkserve.strategies.engine import ModelInfo

INFO = ModelInfo("m", context=4096, vocab_size=512, eos=(0,), think_open=(1,), think_close=(2,))
PLAIN = ModelInfo("m", context=4096, vocab_size=512, eos=(0,))


def spelled(path: str, value: object) -> dict[str, Any]:
    """The body in which `path` has `value`."""
    head, _, rest = path.partition(".")
    return {head: {rest: value} if rest else value}


def merged(*bodies: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for body in bodies:
        for key, value in body.items():
            out[key] = {**out[key], **value} if isinstance(value, dict) and key in out else value
    return out


def decided(body: dict[str, Any], info: ModelInfo = INFO) -> Thinking:
    return thinking(parse_chat({"model": "m", "messages": [{"role": "user", "content": "x"}], **body}), info)


def refusal(body: dict[str, Any], info: ModelInfo = INFO) -> ApiError:
    with pytest.raises(ApiError) as caught:
        decided(body, info)
    assert caught.value.status == 400
    return caught.value


NUMBERS = ["thinking_token_budget", "thinking_budget", "reasoning.max_tokens", "thinking.budget_tokens"]
SWITCHES = [
    "enable_thinking",
    "chat_template_kwargs.enable_thinking",
    "chat_template_kwargs.thinking",
    "reasoning.enabled",
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(("value", "budget"), [(0, 0), (1, 1), (700, 700), (-1, None), (None, None)])
def test_every_alias_sets_the_same_budget(name: str, value: int | None, budget: int | None) -> None:
    """-1 and absent are the model's default, 0 closes thinking at once."""
    assert decided(spelled(name, value)) == Thinking(None, budget)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_budget_beyond_the_context_is_cut_with_a_warning(name: str) -> None:
    """It cannot matter, but the caller is told."""
    result = decided(spelled(name, 10**6))
    assert result.budget == 4096
    assert "4096" in result.warnings[0]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-2, True, 1.5, "100", []])
def test_a_budget_that_is_no_whole_number_is_refused(name: str, value: object) -> None:
    """Booleans and floats are not counts."""
    assert refusal(spelled(name, value)).param == name


@given(
    names=st.lists(st.sampled_from(NUMBERS), min_size=2, max_size=4, unique=True),
    values=st.lists(st.integers(-1, 5000), min_size=4, max_size=4),
)
def test_aliases_agree_or_the_request_is_refused(names: list[str], values: list[int]) -> None:
    """Whichever aliases are combined."""
    pairs = list(zip(names, values, strict=False))
    body = merged(*(spelled(name, value) for name, value in pairs))
    if len({value for _, value in pairs}) == 1:
        assert decided(body) == decided(spelled(*pairs[0]))
    else:
        assert refusal(body).code == "conflicting_parameters"


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [True, False])
def test_every_switch_turns_thinking_on_or_off(name: str, value: bool) -> None:
    """The chat template gets one answer."""
    assert decided(spelled(name, value)) == Thinking(value, None)


def test_deepseeks_switch_is_a_word() -> None:
    """`thinking.type`."""
    assert decided({"thinking": {"type": "disabled"}}).enabled is False
    assert decided({"thinking": {"type": "enabled", "budget_tokens": 9}}) == Thinking(True, 9)


@pytest.mark.parametrize(
    "body",
    [
        {"enable_thinking": True, "chat_template_kwargs": {"thinking": False}},
        {"enable_thinking": False, "reasoning_effort": "low"},
        {"enable_thinking": True, "reasoning_effort": "none"},
        {"enable_thinking": False, "thinking_budget": 5},
        {"reasoning_effort": "low", "reasoning": {"effort": "high"}},
    ],
)
def test_switches_efforts_and_budgets_that_contradict_each_other_are_refused(body: dict[str, Any]) -> None:
    """No silent winner."""
    assert refusal(body).code == "conflicting_parameters"


def test_the_ladder_of_efforts_has_the_published_fractions() -> None:
    """1/32, 1/8, 1/3, 2/3 and the whole."""
    assert ladder(INFO) == {
        "none": 0, "minimal": 128, "low": 512, "medium": 1365, "high": 2730, "xhigh": 4096, "max": 4096,
    }  # fmt: skip
    assert set(ladder(INFO)) == set(get_args(Effort))


@pytest.mark.parametrize("name", ["reasoning_effort", "reasoning.effort"])
def test_an_effort_is_a_budget_and_none_turns_thinking_off(name: str) -> None:
    """Under either name."""
    assert decided(spelled(name, "low")) == Thinking(True, 512)
    assert decided(spelled(name, "none")) == Thinking(False, None)


def test_an_unknown_effort_is_refused_with_all_seven_levels() -> None:
    """Falling back in silence would be a wrong experiment."""
    error = refusal({"reasoning_effort": "hihg"})
    assert all(level in error.message for level in get_args(Effort))


def test_an_explicit_budget_beats_an_effort_with_a_warning() -> None:
    """The number is the more exact wish."""
    result = decided({"reasoning_effort": "low", "thinking_budget": 99})
    assert result.budget == 99
    assert "low" in result.warnings[0]


@pytest.mark.parametrize("body", [{"reasoning_effort": "low"}, {"thinking_budget": 9}, {"enable_thinking": True}])
def test_a_model_that_does_not_think_refuses_budgets(body: dict[str, Any]) -> None:
    """There is nothing to bound."""
    assert refusal(body, PLAIN).code == "unsupported_parameter"


@pytest.mark.parametrize(
    "body", [{}, {"reasoning_effort": "none"}, {"thinking_budget": -1}, {"enable_thinking": False}]
)
def test_a_model_that_does_not_think_accepts_what_asks_for_no_thinking(body: dict[str, Any]) -> None:
    """It does that anyway."""
    assert decided(body, PLAIN).budget is None
