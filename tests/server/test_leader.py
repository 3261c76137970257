"""Stream mode "leader": thoughts of the chain that is ahead while a race is on, and the winner's whole in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.test_streaming import chunks, joined
from thinkserve.server.leader import Leader
from thinkserve.strategies import registry
from thinkserve.strategies.engine import Answer, Event, Piece, Task
from thinkserve.strategies.errors import EngineFailed
from thinkserve.strategies.testing import ScriptedEngine

Serve = Callable[..., Any]
LED = [
    entry.id
    for entry in map(registry.get, registry.names())
    if "leader" in entry.supports.stream and not set(entry.roles) - {"target"}
]


def led(server: Any, name: str = "majority", **more: Any) -> list[dict[str, Any]]:
    """The chunks of a race whose leader is followed."""
    asked = {"name": name, "params": {"k": more.pop("k", 3)}, "stream": "leader"}
    return chunks(server.chat(stream=True, strategy=asked, **more).text)


def thoughts(server: Any, name: str = "majority", **more: Any) -> str:
    return joined(led(server, name, **more), "reasoning")


def test_the_leader_is_heard_while_the_others_still_think(serve: Serve) -> None:
    """Its thoughts come piece by piece and not in one at the end, and are not said again when it wins."""
    server = serve(
        ScriptedEngine(["\nshort one</think>\\boxed{4}", "one that is much longer</think>\\boxed{4}"], pace={1: 2})
    )
    found = led(server, k=2)
    told = [text for chunk in found for choice in chunk["choices"] if (text := choice["delta"].get("reasoning"))]
    assert len(told) > 5
    assert ("".join(told), joined(found, "content")) == ("short one", "\\boxed{4}")


def test_whoever_is_done_thinking_first_takes_the_lead(serve: Serve) -> None:
    """Said by an event; its thoughts are a paragraph of their own, from the beginning, and what was shown stays."""
    server = serve(
        ScriptedEngine(["\nslow and very long winded</think>\\boxed{5}", "\nquick</think>\\boxed{4}"], pace={1: 2})
    )
    found = led(server, "short-m-at-k", k=2, stream_options={"include_progress": True})
    told = joined(found, "reasoning")
    assert told.startswith("slow")
    assert told.endswith("\n\nquick")
    happened = [event["type"] for chunk in found if (event := chunk.get("strategy_event"))]
    assert happened.count("leader") == 1


def test_a_winner_who_did_not_lead_is_shown_whole(serve: Serve) -> None:
    """Two of three agree against the one that was done first."""
    scripts = ["a\n\nb</think>\\boxed{5}", "first long</think>\\boxed{4}", "second longer</think>\\boxed{4}"]
    assert thoughts(serve(ScriptedEngine(scripts, pace={1: 2, 2: 2}))) == "a\n\nb\n\nfirst long"


def test_the_lead_of_a_chain_that_fails_passes_on(serve: Serve) -> None:
    """To whoever has thought most."""
    scripts = ["gone so soon</think>\\boxed{5}", "here</think>\\boxed{4}", "there</think>\\boxed{4}"]
    told = thoughts(serve(ScriptedEngine(scripts, fail={0: (3, EngineFailed("lost"))}, pace={1: 2, 2: 3})))
    assert told == "gon\n\nhere"


def test_nothing_else_changes_with_it(serve: Serve) -> None:
    """Content and usage are those of the default, and a plain answer shows the winner's thoughts alone."""
    scripts = ["a long way to it</think>\\boxed{5}", "first</think>\\boxed{4}", "second</think>\\boxed{4}"]
    usage = {"include_usage": True}
    plain = {"name": "majority", "params": {"k": 3}}
    ours = led(serve(ScriptedEngine(scripts)), stream_options=usage, seed=1)
    other = chunks(serve(ScriptedEngine(scripts)).chat(stream=True, strategy=plain, stream_options=usage, seed=1).text)
    for found in (ours, other):
        for key in ("wall_ms", "ttft_ms", "trace_id"):
            del found[-1]["usage"]["strategy"][key]
    assert ours[-1]["usage"] == other[-1]["usage"]
    assert joined(ours, "content") == joined(other, "content")
    whole = serve(ScriptedEngine(scripts)).chat(strategy={**plain, "stream": "leader"}).json()
    assert whole["choices"][0]["message"]["reasoning"] == joined(other, "reasoning") == "first"


def test_whoever_wants_no_thoughts_gets_none_of_the_leader(serve: Serve) -> None:
    """`include_reasoning: false` goes before."""
    found = led(serve(ScriptedEngine(["long</think>\\boxed{4}", "x</think>\\boxed{4}"])), include_reasoning=False)
    assert (joined(found, "reasoning"), joined(found, "content")) == ("", "\\boxed{4}")


def test_trees_have_no_leader(serve: Serve) -> None:
    """A strategy that cannot say who leads refuses to."""
    asked = {"name": "single", "stream": "leader"}
    error = serve(ScriptedEngine(["a</think>b"])).chat(stream=True, strategy=asked).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "strategy.stream")


@pytest.mark.parametrize("name", LED)
@given(st.lists(st.tuples(st.text("ab\n", max_size=9), st.booleans(), st.sampled_from("45")), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_every_token_of_the_winner_is_shown_once_and_in_order(name: str, chains: list[tuple[str, bool, str]]) -> None:
    """Whatever the chains write: behind the last change of leader stands what the strategy committed."""
    scripts = [f"{text}</think>{answer}" if closed else text for text, closed, answer in chains]
    engine, entry, shown = ScriptedEngine(scripts), registry.get(name), list[Piece | Event]()

    async def show(item: Piece | Event) -> None:
        shown.append(item)

    async def go() -> Answer:
        task = Task(engine.encode("q"), max_tokens=64)
        leader = Leader(engine, task, show)
        return await entry.run(task, leader, leader.commit, entry.options())

    answer = anyio.run(go)
    changes = [at for at, item in enumerate(shown) if isinstance(item, Event) and item.type == "leader"]
    last = [item for item in shown[changes[-1] if changes else 0 :] if isinstance(item, Piece)]
    end = engine.info().eos[0]  # of an open thought, where the strategy closes it in its place
    assert [t for item in last for t in item.tokens if t != end] == [t for t in answer.tokens if t != end]
    assert engine.live == []
