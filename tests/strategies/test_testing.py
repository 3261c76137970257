"""ScriptedEngine: what other tests take for granted of it."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from thinkserve.strategies.engine import Delta, Finish, Job, Path, Sampling, Score, Stream, Tokens
from thinkserve.strategies.errors import EngineFailed, Unsupported
from thinkserve.strategies.testing import SCRIPTED, ScriptedEngine

pytestmark = pytest.mark.anyio


async def read(stream: Stream) -> tuple[Tokens, Finish | None]:
    """Everything a stream has to give."""
    deltas: list[Delta] = [delta async for delta in stream]
    return tuple(token for delta in deltas for token in delta.tokens), deltas[-1].finish


async def run(engine: ScriptedEngine, job: Job) -> tuple[str, Finish | None]:
    """A job's text (tags left out) and finish."""
    async with engine.generate(job) as stream:
        tokens, finish = await read(stream)
    return engine.decode(tokens), finish


@pytest.mark.parametrize("text", ["", "plain", "<think>a</think>b<eos>", "żółć 🦉", "</think></think>"])
async def test_text_survives_encoding_and_decoding(text: str) -> None:
    """Decoding gives the text back, tags left out."""
    engine = ScriptedEngine([""])

    plain = text.replace("<think>", "").replace("</think>", "").replace("<eos>", "")

    assert plain == engine.decode(engine.encode(text))


async def test_a_detokenizer_never_shows_a_broken_character() -> None:
    """Pieces hold whole characters only, and add up to the text."""
    engine = ScriptedEngine([""])
    decoder = engine.detokenizer()

    pieces = [decoder.push([token]) for token in engine.encode("a🦉b")] + [decoder.flush()]

    assert pieces == ["a", "", "", "", "🦉", "b", ""]


async def test_jobs_write_the_scripts_in_turn() -> None:
    """The i-th job writes script i modulo their number, to its end."""
    engine = ScriptedEngine(["one", "two"])

    texts = [await run(engine, Job((9,), 99, seed=seed)) for seed in range(3)]

    assert [("one", "stop"), ("two", "stop"), ("one", "stop")] == texts


async def test_a_function_may_choose_the_script_by_job() -> None:
    """Scripts can depend on seed, prompt and index."""
    engine = ScriptedEngine(lambda job, index: f"seed {job.seed} of {index}")

    assert ("seed 7 of 0", "stop") == await run(engine, Job((9,), 99, seed=7))


async def test_max_tokens_ends_a_job_with_length() -> None:
    """No more than max_tokens; an end of sequence that just fits is "stop"."""
    engine = ScriptedEngine(["abc"])

    assert ("abc", "length") == await run(engine, Job((9,), 3))
    assert ("abc", "stop") == await run(engine, Job((9,), 4))


async def test_tokens_that_run_out_without_an_end_mean_length() -> None:
    """A script given as tokens ends where it ends."""
    engine = ScriptedEngine([(65, 66)])

    assert ("length",) == (await run(engine, Job((9,), 9)))[1:]


async def test_stop_tokens_and_stop_strings_end_a_job_and_stay() -> None:
    """Both kinds of stop are part of the text."""
    engine = ScriptedEngine(["ab\n\ncd"])
    newline = engine.encode("\n")

    assert ("ab\n", "stop") == await run(engine, Job((9,), 99, stop_tokens=newline))
    assert ("ab\n\nc", "stop") == await run(engine, Job((9,), 99, stop=("\nc", "x")))


async def test_a_thinking_budget_forces_the_closing_tag() -> None:
    """After that many thinking tokens the tag comes, and then the script's answer."""
    engine = ScriptedEngine(["thinking</think>answer"])
    prompt = engine.encode("q<think>")

    async with engine.generate(Job(prompt, 99, thinking_budget=3)) as stream:
        tokens, _ = await read(stream)

    assert engine.encode("thi</think>answer<eos>") == tokens


async def test_a_thinking_budget_leaves_short_thinking_alone() -> None:
    """Thinking that ends in time is not touched, nor is an answer without thinking."""
    engine = ScriptedEngine(["hm</think>yes", "yes"])

    assert "hmyes" == (await run(engine, Job(engine.encode("q<think>"), 99, thinking_budget=2)))[0]
    assert "yes" == (await run(engine, Job(engine.encode("q"), 99, thinking_budget=0)))[0]


async def test_a_thinking_budget_works_with_tags_of_several_tokens() -> None:
    """The whole tag is forced."""
    engine = ScriptedEngine(["thinking</think>a"], info=replace(SCRIPTED, think_close=(2, 2)))

    async with engine.generate(Job(engine.encode("<think>"), 99, thinking_budget=1)) as stream:
        tokens, _ = await read(stream)

    assert engine.encode("t</think>a<eos>") == tokens


async def test_live_streams_advance_in_lockstep() -> None:
    """Whatever their readers' order, all have the same number of tokens at every step."""
    engine = ScriptedEngine(["a" * 20] * 3)
    spreads: set[int] = set()

    async def follow(job: Job) -> None:
        async with engine.generate(job) as stream:
            async for _ in stream:
                counts = [other.generated for other in engine.history]
                spreads.add(max(counts) - min(counts))

    async with anyio.create_task_group() as group:
        for seed in range(3):
            group.start_soon(follow, Job((9,), 99, seed=seed))

    assert {0} == spreads
    assert 21 == engine.steps


async def test_pace_slows_a_job_down() -> None:
    """A job of pace 3 gets every third step."""
    engine = ScriptedEngine(["abcd"], pace={0: 3})

    await run(engine, Job((9,), 99))

    assert 15 == engine.steps


async def test_burst_gives_several_tokens_in_a_delta() -> None:
    """Deltas may hold more than one token, the last one fewer."""
    engine = ScriptedEngine(["abcd"], burst=3)

    async with engine.generate(Job((9,), 99)) as stream:
        sizes = [len(delta.tokens) async for delta in stream]

    assert [3, 2] == sizes


async def test_unread_and_overrun_tokens_are_counted() -> None:
    """A job nobody reads goes on, and an aborted one may have sampled a little more."""
    engine = ScriptedEngine(["a" * 9, "b" * 9], overrun=2)

    async with engine.generate(Job((9,), 99, seed=0)) as idle:
        await run(engine, Job((9,), 4, seed=1))

    assert 6 == idle.generated
    assert "<ScriptedEngine 2 jobs: 0 live, 1 finished, 1 aborted, 0 failed | 10 tokens in 4 steps>" == repr(engine)


async def test_a_failure_comes_after_the_tokens_before_it() -> None:
    """The error is raised in place of token n."""
    engine = ScriptedEngine(["abcdef"], fail={0: (2, EngineFailed("lost"))})

    async with engine.generate(Job((9,), 99)) as stream:
        read = [await anext(stream), await anext(stream)]
        with pytest.raises(EngineFailed, match="lost"):
            await anext(stream)

    assert engine.decode([token for delta in read for token in delta.tokens]) == "ab"
    assert engine.live == []


@pytest.mark.parametrize(("limits", "finish"), [({"ceiling": 5}, "ceiling"), ({"deadline": 5}, "deadline")])
async def test_limits_of_the_whole_request_end_every_stream(limits: dict[str, int], finish: str) -> None:
    """As the wrappers of a server do."""
    engine = ScriptedEngine(["abcdefgh"], **limits)  # type: ignore[arg-type]

    assert ("abcde", finish) == await run(engine, Job((9,), 99))


async def test_a_job_that_continues_another_goes_on_with_its_script() -> None:
    """Same seed, longer prompt: no new script; after a closing tag of ours the answer follows."""
    engine = ScriptedEngine(["thinking</think>answer", "other"])
    prompt = engine.encode("q<think>")
    await run(engine, Job(prompt, 3, seed=5))

    assert "nking" == (await run(engine, Job(prompt + engine.encode("thi"), 5, seed=5)))[0]
    assert "answer" == (await run(engine, Job(prompt + engine.encode("th</think>"), 99, seed=5)))[0]
    assert "other" == (await run(engine, Job(prompt, 99, seed=6)))[0]


async def test_scores_come_from_the_function_and_are_recorded() -> None:
    """One reward per step that is not known yet; unknown roles are refused."""
    engine = ScriptedEngine([""], roles=("target", "reward"), rate=lambda steps: len(steps) / 10)
    paths = [Path(("one", "two")), Path(("one", "two", "three"), known=2)]

    assert [Score((0.1, 0.2), tokens=6), Score((0.3,), tokens=11, cached=6)] == await engine.score("why?", paths)
    assert [("why?", tuple(paths))] == engine.scored
    with pytest.raises(Unsupported):
        await engine.score("why?", paths, "verifier")


async def test_a_chat_is_rendered_with_thinking_closed() -> None:
    """So that the reply begins with its answer."""
    engine = ScriptedEngine([""])
    assert engine.encode("user: Yes?\n<think></think>") == await engine.render([{"role": "user", "content": "Yes?"}])


async def test_alternatives_come_when_asked_for() -> None:
    """One log-probability per token always, `top` only on demand."""
    engine = ScriptedEngine(["ab"])

    async with engine.generate(Job((9,), 1, Sampling(), logprobs=2)) as stream:
        delta = await anext(stream)

    assert (1, 1, 2) == (len(delta.logprobs), len(delta.top), len(delta.top[0]))
    assert (delta.tokens[0], delta.logprobs[0]) == delta.top[0][0]


async def test_a_tick_takes_real_time() -> None:
    """With `tick` a step lasts that long, however many streams wait."""
    engine = ScriptedEngine(["abcd"] * 2, tick=0.01)
    started = anyio.current_time()

    async with anyio.create_task_group() as group:
        for seed in range(2):
            group.start_soon(run, engine, Job((9,), 99, seed=seed))

    assert anyio.current_time() - started >= 0.05
    assert engine.steps <= 7
