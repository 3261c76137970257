"""Which models a server loads, for which roles and with how much memory, is known before anything slow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.server import deployment
from thinkserve.server.deployment import Local, Remote, plan_models, target_alone
from thinkserve.server.model_dir import ModelDir, StartError
from thinkserve.server.settings import Settings

Make = Callable[..., str]
VOCABULARY = {"a": 0, "b": 1, "c": 2}
AT = "@"  # apart, because an address with a password looks like a leak to the test of all texts
THINK = [{"id": 3, "content": "<think>", "special": True}]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Folders that look like models."""

    def one(
        name: str,
        architecture: str = "Qwen3ForCausalLM",
        vocabulary: dict[str, int] = VOCABULARY,
        added: list[dict[str, Any]] = THINK,
        size: int = 1,
    ) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
        return str(folder)

    return one


def roles(places: tuple[Local, ...]) -> dict[str, tuple[str, ...]]:
    return {place.name: place.roles for place in places}


def test_a_model_that_is_named_stands_alone(make: Make) -> None:
    """Nobody pays for helpers that they did not ask for."""
    found = plan_models(Settings(model=make("m")), cpu=True)

    assert ({"m": ("target",)}, ()) == (roles(found.local), found.remote)


def test_a_model_that_is_given_twice_is_loaded_once(make: Make) -> None:
    """However its folder is written."""
    large = make("large")
    found = plan_models(Settings(model=make("m"), guide=large, verifier=f"{large}/../large"), cpu=True)

    assert {"m": ("target",), "large": ("guide", "verifier")} == roles(found.local)
    assert {"large": ("target", "guide")} == roles(plan_models(Settings(model=large, guide=large), cpu=True).local)


def test_the_embedded_family_fills_every_role_that_it_can(make: Make, tmp_path: Path, monkeypatch: Any) -> None:
    """Unless a role is switched off or given to another; a member that is not there is not missed."""
    for name in ("arith-small", "arith-large"):
        make(name)
    monkeypatch.setattr(deployment, "MODELS", tmp_path)
    monkeypatch.setattr("thinkserve.server.model_dir.MODELS", tmp_path)

    assert {"arith-small": ("target",), "arith-large": ("guide", "verifier")} == roles(
        plan_models(Settings(), cpu=True).local
    )
    make("arith-prm", "Qwen3ForTokenClassification")
    assert {"arith-small": ("target",), "arith-prm": ("reward",), "arith-large": ("verifier",)} == roles(
        plan_models(Settings(guide="none"), cpu=True).local
    )


def test_an_address_is_a_role_on_another_server(make: Make) -> None:
    """Nothing is loaded for it."""
    found = plan_models(Settings(model=make("m"), guide="http://127.0.0.1:8001/", reward="https://prm"), cpu=True)

    assert (Remote("guide", "http://127.0.0.1:8001"), Remote("reward", "https://prm")) == found.remote
    assert 1 == len(found.local)


@pytest.mark.parametrize(
    "url", ["http://", f"http://me:secret{AT}host", "http://host:port", "https://[::1", "http://h/?key=secret"]
)
def test_an_address_that_is_none_is_told_without_showing_it(make: Make, url: str) -> None:
    """A password must not end up in a log."""
    with pytest.raises(StartError, match="guide: not the address of a server") as caught:
        plan_models(Settings(model=make("m"), guide=url), cpu=True)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("vocabulary", "added", "said"),
    [
        ({"a": 0, "b": 2, "c": 1}, THINK, "token 'b' is 1 in m and 2 in other"),
        ({"a": 0, "b": 1}, THINK, "token 'c' is 2 in m and missing in other"),
        (VOCABULARY, [], "token '<think>' is special token 3 in m and missing in other"),
        (VOCABULARY, [{**THINK[0], "special": False}], "token '<think>' is special token 3 in m and 3 in other"),
    ],
)
def test_a_guide_of_another_vocabulary_is_refused(
    make: Make, vocabulary: dict[str, int], added: list[dict[str, Any]], said: str
) -> None:
    """With the first token that differs; a verifier, which is asked in text, may differ."""
    model, other = make("m"), make("other", vocabulary=vocabulary, added=added)

    with pytest.raises(StartError, match="The guide other does not fit m: ") as caught:
        plan_models(Settings(model=model, guide=other), cpu=True)
    assert str(caught.value).endswith(said)
    assert 2 == len(plan_models(Settings(model=model, verifier=other), cpu=True).local)


def test_a_tokenizer_that_cannot_be_read_is_told_in_one_line(make: Make) -> None:
    """Such as the pointer that git leaves where a large file was not fetched."""
    model, other = make("m"), make("other")
    (Path(other) / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")

    with pytest.raises(StartError, match=f"Cannot read {other}/tokenizer.json: "):
        plan_models(Settings(model=model, guide=other), cpu=True)


@pytest.mark.parametrize("role", ["guide", "verifier"])
def test_a_reward_model_cannot_write(make: Make, role: str) -> None:
    """Nor can one that writes rate steps, nor one model do both."""
    model, prm = make("m"), make("prm", "Qwen3ForTokenClassification")

    with pytest.raises(StartError, match=f"rates steps; it is no {role}"):
        plan_models(Settings.model_validate({"model": model, role: prm}), cpu=True)
    with pytest.raises(StartError, match="is no process reward model"):
        plan_models(Settings(model=model, reward=model), cpu=True)
    with pytest.raises(StartError, match="rates steps; it is no target"):
        plan_models(Settings(model=prm), cpu=True)


def test_models_of_one_name_are_told_apart(make: Make) -> None:
    """In metrics and in the banner."""
    found = plan_models(Settings(model=make("a/m"), guide=make("b/m"), served_name="m"), cpu=True)

    assert ["m", "m-guide"] == [place.name for place in found.local]


def test_on_a_cpu_every_model_has_a_cache_of_a_known_size(make: Make) -> None:
    """The largest that one of its roles is to have."""
    large, prm = make("large"), make("prm", "Qwen2ForProcessRewardModel")
    found = plan_models(
        Settings(model=make("m"), guide=large, verifier=large, reward=prm, role_kv_gib={"verifier": 2, "guide": 0.25}),
        cpu=True,
    )

    assert {"m": 1.0, "large": 2.0, "prm": 0.5} == {place.name: place.kv_gib for place in found.local}
    assert 0.25 == target_alone(Settings(model=large, kv_cache_gib=0.25), cpu=True).kv_gib


@given(st.lists(st.one_of(st.none(), st.floats(0.01, 100)), min_size=3, max_size=3), st.floats(0.1, 1))
def test_on_a_gpu_the_shares_are_what_the_operator_gives(asked: list[float | None], given: float) -> None:
    """Together neither more nor less, and never nothing; a size that is given stays as it is."""
    places = [Local((role,), FOLDER, role) for role in ("target", "guide", "reward")]
    helpers = {role: gib for role, gib in zip(("guide", "reward"), asked[1:], strict=True) if gib is not None}
    settings = Settings(kv_cache_gib=asked[0], role_kv_gib=helpers, gpu_memory_utilization=given)
    found = list(deployment._with_memory(places, settings, cpu=False))

    assert pytest.approx(given) == sum(place.gpu_share for place in found)
    assert all(place.gpu_share > 0 for place in found)
    assert asked == [place.kv_gib for place in found]


FOLDER = ModelDir(Path("m"), "Qwen3ForCausalLM", 2**30)
