"""Which strategy serves a request, and what happens when two places disagree about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import thread_time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.server import header_item
from thinkserve.server.choice import Choice, check_settings, choose, resolve
from thinkserve.server.errors import ApiError
from thinkserve.server.protocol import parse_chat
from thinkserve.server.settings import Preset, PresetLayer, Settings
from thinkserve.strategies import registry

SERVED = "arith-small"
RACE = {"k": 8, "m": 3}


def chosen(body: Mapping[str, Any] = {}, header: Sequence[str] = (), **settings: Any) -> Choice:
    chat = parse_chat({"model": SERVED, "messages": [{"role": "user", "content": "1+1"}], **body})
    return choose(chat, header, Settings(**settings), SERVED)


def refusal(body: Mapping[str, Any] = {}, header: Sequence[str] = (), **settings: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chosen(body, header, **settings)
    return caught.value


@pytest.mark.parametrize(
    ("body", "header", "expected"),
    [
        ({"strategy": "majority"}, [], "majority"),
        ({"strategy": "short-m@k"}, [], "short-m-at-k"),
        ({"strategy": {"name": "short-m-at-k", "params": {"k": 4, "m": 2}}}, [], "short-m-at-k"),
        ({"reasoning": {"mode": "majority"}}, [], "majority"),
        ({"reasoning": {"mode": "race"}}, [], "short-m-at-k"),
        ({}, ["short-m-at-k; k=8; m=3"], "short-m-at-k"),
        ({}, ['"short-m@k"; k=8'], "short-m-at-k"),
        ({"model": f"{SERVED}:race"}, [], "short-m-at-k"),
        ({}, [], "single"),
    ],
)
def test_each_place_can_choose_a_strategy(body: dict[str, Any], header: list[str], expected: str) -> None:
    """Body, reasoning.mode, header, model suffix, default."""
    assert chosen(body, header).strategy.id == expected


def test_parameters_arrive_from_body_header_and_preset_alike() -> None:
    """The same parameters give equal options wherever they stand."""
    body = chosen({"strategy": {"name": "short-m-at-k", "params": RACE}})
    header = chosen(header=["short-m-at-k; k=8; m=3"])
    suffix = chosen({"model": f"{SERVED}:race"})
    assert body.options == header.options == suffix.options
    assert suffix.preset == "race"


def test_the_same_choice_made_twice_is_no_conflict() -> None:
    """Proxies and SDK defaults may repeat what the caller said."""
    body = {"model": f"{SERVED}:race", "strategy": {"name": "short-m@k", "params": RACE}}
    assert chosen(body, ["short-m-at-k;k=8;m=3"]).options.model_dump()["k"] == 8


@pytest.mark.parametrize(
    ("body", "header", "where"),
    [
        ({"strategy": "majority", "reasoning": {"mode": "single"}}, [], "reasoning.mode"),
        ({"strategy": "majority"}, ["single"], "X-Reasoning-Strategy"),
        (
            {"strategy": {"name": "short-m-at-k", "params": {"k": 8, "m": 2}}},
            ["short-m-at-k; k=8; m=3"],
            "X-Reasoning-Strategy",
        ),
        ({"model": f"{SERVED}:race", "strategy": "majority"}, [], "model"),
    ],
)
def test_two_different_choices_are_an_error_that_names_both(
    body: dict[str, Any], header: list[str], where: str
) -> None:
    """A parameter that is passed over in silence would be a wrong experiment."""
    error = refusal(body, header)
    assert (error.status, error.code, error.param) == (400, "conflicting_strategy", where)
    assert "strategy" in error.message
    assert where in error.message


def test_a_strategy_beats_the_effort_map_and_the_map_beats_the_default() -> None:
    """Effort picks a preset only when the operator said so and the caller chose nothing."""
    mapped: dict[str, Any] = {"effort_map": {"high": "race"}}
    assert chosen({"reasoning_effort": "high"}, **mapped).preset == "race"
    assert chosen({"reasoning_effort": "high", "strategy": "single"}, **mapped).strategy.id == "single"
    assert chosen({"reasoning_effort": "low"}, **mapped).strategy.id == "single"


def test_the_effort_map_means_the_preset_even_where_a_strategy_has_its_name() -> None:
    """With its parameters and modifiers, as the model of that name has them."""
    guarded = Preset(strategy="majority", params={"k": 2}, over=(PresetLayer(name="repetition-guard"),))
    known: dict[str, Any] = {"presets": {"majority": guarded}, "effort_map": {"high": "majority"}}
    mapped, named = chosen({"reasoning_effort": "high"}, **known), chosen({"model": f"{SERVED}:majority"}, **known)
    assert (mapped.preset, mapped.options, mapped.over) == (named.preset, named.options, named.over)
    assert mapped.options.chains() == 2
    assert (mapped.param, named.param) == ("reasoning_effort", "model")


@pytest.mark.parametrize(
    ("body", "code", "param", "hint"),
    [
        ({"strategy": "majorty"}, "unknown_strategy", "strategy", "'majority'"),
        ({"strategy": {"name": "short-mk"}}, "unknown_strategy", "strategy.name", "'short-m"),
        ({"reasoning": {"mode": "pro\ud800"}}, "unknown_strategy", "reasoning.mode", "Available"),
        ({"strategy": "x" * 10**6}, "unknown_strategy", "strategy", "Available"),
        ({"strategy": {"name": "short-m-at-k", "params": {"K": 8}}}, "unknown_parameter", "strategy.params.K", "'k'"),
        ({"strategy": {"name": "single", "params": {"k": 8}}}, "unknown_parameter", "strategy.params.k", "none"),
        ({"strategy": {"name": "majority", "parms": {}}}, "unknown_parameter", "strategy.parms", "'params'"),
        ({"strategy": {"params": {}}}, "missing_field", "strategy.name", "name"),
        ({"strategy": 7}, "invalid_type", "strategy", "strategy"),
        ({"strategy": {"name": "race", "params": {"k": 2}}}, "unsupported_parameter", "strategy.params", "fixed"),
        (
            {"strategy": {"name": "short-m-at-k", "params": {"k": 2, "m": 3}}},
            "value_out_of_range",
            "strategy.params.m",
            "k",
        ),
    ],
)
def test_a_wrong_name_or_parameter_is_named_with_its_nearest_neighbour(
    body: dict[str, Any], code: str, param: str, hint: str
) -> None:
    """The path points at the field, the message helps."""
    error = refusal(body)
    assert (error.status, error.code, error.param) == (400, code, param)
    assert hint in error.message
    assert len(error.message) < 1000


@pytest.mark.parametrize("name", ["trimr", "speculative-thinking", "steering"])
def test_a_million_mistakes_are_told_as_one(name: str) -> None:
    """In the time of one: nobody else is served meanwhile."""
    many = [[0]] * 100_000
    started = thread_time()
    for field in registry.get(name).options.model_fields:
        error = refusal({"strategy": {"name": name, "params": {field: many}}})
        assert (error.code, error.param) == ("value_out_of_range", "strategy.params")
    assert thread_time() - started < 1


@pytest.mark.parametrize("k", [0, -1, 10**9, 1.5, "8", True, None, [8]])
def test_a_count_that_is_not_a_small_positive_integer_is_refused(k: object) -> None:
    """No coercion, no clamping."""
    error = refusal({"strategy": {"name": "majority", "params": {"k": k}}})
    assert (error.status, error.param) == (400, "strategy.params.k")
    assert error.code in {"invalid_type", "value_out_of_range"}


@pytest.mark.parametrize("model", ["gpt-4o", f"{SERVED}:nope", f"{SERVED}:", ":race", "other:race", f"{SERVED}-race"])
def test_an_unknown_model_is_404_and_says_what_there_is(model: str) -> None:
    """Exact name first, then a known preset behind the last colon, else not found."""
    error = refusal({"model": model})
    assert (error.status, error.code) == (404, "model_not_found")
    assert f"{SERVED}:race" in error.message


def test_a_served_name_may_hold_a_colon_itself() -> None:
    """Names in the style of other servers' tags are matched whole before they are split."""
    chat = parse_chat({"model": "qwen:8b", "messages": [{"role": "user", "content": "x"}]})
    assert choose(chat, [], Settings(), "qwen:8b").strategy.id == "single"


@pytest.mark.parametrize(
    "header", ["", "a b", "majority; k", "majority; k=", 'majority; k="', "majority, single", "(majority)"]
)
def test_a_malformed_header_is_refused(header: str) -> None:
    """RFC 8941 items only; a bare parameter is a boolean and no count."""
    assert refusal(header=[header]).status == 400


def test_the_written_choice_reads_back_as_the_same_choice() -> None:
    """What the response header says can be sent as a request header."""
    first = resolve("short-m-at-k", {"k": 5, "m": 2}, Settings(), where="x")
    name, params = header_item.parse(first.written())
    assert resolve(name, params, Settings(), where="x").options == first.options


@given(text=st.text(max_size=40))
def test_any_header_text_is_an_item_or_a_value_error(text: str) -> None:
    """The parser never fails in another way."""
    try:
        name, _ = header_item.parse(text)
    except ValueError:
        return
    assert name or text.strip().startswith('"')


@given(
    parameters=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True),
        st.booleans()
        | st.integers(-(10**14), 10**14)
        | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
        max_size=4,
    )
)
def test_items_survive_writing_and_reading(parameters: dict[str, header_item.Bare]) -> None:
    """Booleans, integers and ASCII strings keep value and type."""
    assert header_item.parse(header_item.write("single", parameters)) == ("single", parameters)


@pytest.mark.parametrize(
    "settings",
    [
        {"default_strategy": "nope"},
        {"presets": {"race": Preset(strategy="nope")}},
        {"presets": {"race": Preset(strategy="majority", params={"q": 1})}},
        {"presets": {SERVED: Preset(strategy="majority")}},
        {"presets": {"Not A Slug": Preset(strategy="majority")}},
        {"presets": {"race": Preset(strategy="majority", over=(PresetLayer(name="nope"),))}},
        {"presets": {"race": Preset(strategy="majority", over=(PresetLayer(name="trimr", params={"q": 1}),))}},
        {"presets": {"race": Preset(strategy="particle", over=(PresetLayer(name="repetition-guard"),))}},
        {"presets": {"race": Preset(strategy="beam", over=(PresetLayer(name="trimr"),))}},
        {"effort_map": {"high": "nope"}},
    ],
)
def test_a_configuration_that_cannot_work_is_found_at_start_up(settings: dict[str, Any]) -> None:
    """Better no server than one whose presets fail at the first request."""
    with pytest.raises(ValueError, match=r"."):
        check_settings(Settings(**settings), SERVED)


def test_the_default_configuration_works() -> None:
    """Presets of the README name strategies that exist."""
    check_settings(Settings(), SERVED)


def test_a_preset_has_modifiers_of_its_own_which_nobody_can_change() -> None:
    """They come with the preset, by any way that names it; a body that names others, or asks for none, contradicts."""
    guarded = Preset(strategy="majority", params={"k": 4}, over=(PresetLayer(name="repetition-guard"),))
    known: dict[str, Any] = {"presets": {"guarded": guarded}}
    layer = [{"name": "repetition-guard"}]
    for body in ({"model": f"{SERVED}:guarded"}, {"strategy": "guarded"}, {"reasoning": {"mode": "guarded"}}):
        assert ["repetition-guard"] == [each.modifier.id for each in chosen(body, **known).over]
    plain = {"name": "majority", "params": {"k": 4}}
    same = chosen({"model": f"{SERVED}:guarded", "strategy": {**plain, "over": layer}}, **known)
    assert ["repetition-guard"] == [each.modifier.id for each in same.over]
    fixed = refusal({"strategy": {"name": "guarded", "over": layer}}, **known)
    assert ("unsupported_parameter", "strategy.over") == (fixed.code, fixed.param)
    for body, header in (({}, ["majority; k=4"]), ({"reasoning": {"mode": "guarded"}}, ["majority; k=4"])):
        echoed = chosen({"model": f"{SERVED}:guarded", **body}, header, **known)
        assert ["repetition-guard"] == [each.modifier.id for each in echoed.over]
    contradicted = refusal({"model": f"{SERVED}:guarded", "strategy": plain}, **known)
    assert "conflicting_strategy" == contradicted.code
    assert "over repetition-guard" in contradicted.message
