"""What discovery says is what the server does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter

from thinkserve.server import discovery
from thinkserve.server.choice import checked
from thinkserve.server.errors import ApiError
from thinkserve.server.protocol import ChatRequest
from thinkserve.server.settings import Preset, PresetLayer, Settings
from thinkserve.server.testing import ScriptedBackend
from thinkserve.server.translate import served_name
from thinkserve.server.wire_types import ModelList, StrategyList
from thinkserve.strategies import registry
from thinkserve.strategies.engine import ModelInfo
from thinkserve.strategies.registry import Options
from thinkserve.strategies.testing import ScriptedEngine, example

THINKER = ModelInfo("models/arith", context=4096, vocab_size=512, eos=(0,), think_open=(1,), think_close=(2,))
PLAIN = ModelInfo("arith", context=4096, vocab_size=512, eos=(0,))


def backend(info: ModelInfo = THINKER) -> ScriptedBackend:
    """A model that fills the role `target` alone."""
    return ScriptedBackend(ScriptedEngine([], info=info))


@dataclass
class Serving:
    settings: Settings = field(default_factory=Settings)
    backend: ScriptedBackend = field(default_factory=backend)


def test_the_model_and_every_preset_are_cards_of_the_published_shape() -> None:
    """Pickers that know nothing of strategies offer the presets as models."""
    cards = discovery.models(Serving(), 1000)
    assert TypeAdapter(ModelList).validate_python(cards, strict=True) == cards
    assert [(card["id"], card["root"], card["parent"]) for card in cards["data"]] == [
        ("arith", "arith", None),
        *[(f"arith:{preset}", "arith", "arith") for preset in Settings().presets],
    ]
    assert discovery.model(Serving(), 1000, "arith:race")["strategies"] == ["short-m-at-k"]


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        (Preset(strategy="best-of-n"), {}),
        (Preset(strategy="particle", params={"weights": "odds"}), {}),
        (Preset(strategy="single", over=(PresetLayer(name="trimr"),)), {}),
        (Preset(strategy="steering", params={"vector": "brief"}), {}),
        (Preset(strategy="majority", params={"k": 4}), {"max_chains": 3}),
    ],
    ids=["role", "role of a parameter", "role of a modifier", "steering", "chains"],
)
def test_a_preset_that_every_request_is_refused_for_is_not_offered(preset: Preset, settings: dict[str, Any]) -> None:
    """A picker shows what works."""
    serving = Serving(Settings(presets={"solo": Preset(strategy="single"), "not": preset}, **settings))
    assert [card["id"] for card in discovery.models(serving, 0)["data"]] == ["arith", "arith:solo"]


def test_the_served_name_is_the_configured_one_or_the_last_part_of_the_path() -> None:
    """Clients see no directories."""
    assert served_name(Serving()) == "arith"
    assert served_name(Serving(Settings(served_name="chat"))) == "chat"


def test_a_card_shows_the_budget_of_every_effort() -> None:
    """And nothing of the kind for a model that does not think."""
    reasoning = discovery.model(Serving(), 0, "arith")["reasoning"]
    assert reasoning is not None
    assert (reasoning["budgets"]["low"], reasoning["max_budget"]) == (512, 4096)
    assert discovery.model(Serving(backend=backend(PLAIN)), 0, "arith")["reasoning"] is None


def test_supported_parameters_are_fields_of_the_request() -> None:
    """No promise without a field."""
    assert set(discovery.SUPPORTED) <= set(ChatRequest.model_fields)


@pytest.mark.parametrize("name", ["gpt", "arith:nope", "x" * 10**5, "\ud800"])
def test_an_unknown_model_or_strategy_is_404(name: str) -> None:
    """With what there is."""
    with pytest.raises(ApiError) as caught:
        discovery.model(Serving(), 0, name)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    with pytest.raises(ApiError) as caught:
        discovery.strategy(Serving(), name)
    assert (caught.value.status, caught.value.code) == (404, "unknown_strategy")
    assert len(caught.value.message) < 1000


def test_all_strategies_have_cards_of_the_published_shape() -> None:
    """One per registered strategy, found by alias too."""
    cards = discovery.strategies(Serving())
    assert TypeAdapter(StrategyList).validate_python(cards, strict=True) == cards
    assert [card["id"] for card in cards["data"]] == registry.names()
    assert discovery.strategy(Serving(), "short-m@k") == discovery.strategy(Serving(), "short-m-at-k")
    assert discovery.strategy(Serving(), "short-m-at-k")["presets"] == ["race", "fast"]


@pytest.mark.parametrize("name", registry.names())
def test_defaults_satisfy_the_published_schema(name: str) -> None:
    """The schema is a valid one, and what a client sees as default would be accepted."""
    card = discovery.strategy(Serving(), name)
    Draft202012Validator.check_schema(card["params_schema"])
    given = {**example(registry.get(name)).model_dump(mode="json"), **card["defaults"]}
    Draft202012Validator(card["params_schema"]).validate(given)
    assert checked(registry.get(name), given).model_dump(mode="json") == given
    assert set(given) - set(card["defaults"]) == set(card["params_schema"].get("required", ()))


@pytest.mark.parametrize("name", registry.names())
def test_published_limits_are_the_enforced_limits(name: str) -> None:
    """One above is refused by schema and server alike; the limit itself breaks no bound of its field."""
    entry, card = registry.get(name), discovery.strategy(Serving(), name)
    schema = Draft202012Validator(card["params_schema"])
    for field_name, limit in card["limits"].items():
        if field_name != "chains":
            given = example(entry).model_dump(mode="json")
            assert schema.is_valid({**given, field_name: limit})
            assert not schema.is_valid({**given, field_name: limit + 1})
            with pytest.raises(ApiError) as caught:
                checked(entry, {**given, field_name: limit + 1})
            assert caught.value.param == f"strategy.params.{field_name}"


@pytest.mark.parametrize("name", registry.names())
def test_every_parameter_is_described(name: str) -> None:
    """The schema is the documentation."""
    properties = registry.get(name).options.model_json_schema().get("properties", {})
    assert all(each.get("description") for each in properties.values())


def test_a_strategy_without_its_model_is_shown_as_unavailable() -> None:
    """With what it requires and what is missing."""
    entry = replace(registry.get("single"), roles=("target", "reward"))
    card = discovery.strategy_card(Serving(), entry)
    assert (card["available"], card["requires"]) == (False, ["prm"])
    assert "reward" in str(card["unavailable_reason"])
    assert discovery.strategy(Serving(), "single")["unavailable_reason"] is None


def test_schemas_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them take long enough to hold up every stream of the server."""
    first = discovery.strategies(Serving())
    monkeypatch.setattr(Options, "model_json_schema", None)
    assert discovery.strategies(Serving()) == first


def test_the_etag_changes_with_the_document_only() -> None:
    """Same configuration, same tag."""
    more = Serving(Settings(presets={"solo": Preset(strategy="single")}))
    first, again, other = (discovery.etag(discovery.strategies(each)) for each in (Serving(), Serving(), more))
    assert first == again != other
