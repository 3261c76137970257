"""speculative-thinking: who writes which tokens, when a large model takes over, and what if it is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.server.answer_stops import AnswerStops
from thinkserve.strategies import registry
from thinkserve.strategies.engine import Answer, Event, Job, Piece, Role, Task
from thinkserve.strategies.errors import EngineDead, EngineFailed, Unsupported
from thinkserve.strategies.reflection import label
from thinkserve.strategies.speculative_thinking import SpeculativeOptions, lengths_of
from thinkserve.strategies.testing import SCRIPTED, Recorder, ScriptedEngine, play

pytestmark = pytest.mark.anyio

PROMPT = "q<think>"
BOTH: tuple[Role, ...] = ("target", "guide")


def writer(texts: dict[Role, str] | str, roles: tuple[Role, ...] = BOTH, prompt: str = PROMPT, **more: Any) -> Any:
    """Models that know what they write at every place of the chain: each has a text of its own, or both the same."""
    known = ScriptedEngine([""])
    whole = {role: (*known.encode(texts if isinstance(texts, str) else texts[role]), 0) for role in roles}
    start = len(known.encode(prompt))

    def script(job: Job, _: int) -> tuple[int, ...]:
        text, written = whole[job.role], job.prompt[start:]
        if 2 not in written:
            return text[len(written) :]
        # Thinking may have been closed early, by a budget.
        answer = text.index(2) + 1 if 2 in text else len(text)
        return text[answer + len(written) - written.index(2) - 1 :]

    return ScriptedEngine(script, roles=roles, **more)


def task_for(engine: ScriptedEngine, max_tokens: int = 4000, prompt: str = PROMPT, **more: Any) -> Task:
    return Task(engine.encode(prompt), max_tokens, **more)


def takeovers(out: Recorder) -> list[dict[str, Any]]:
    return [dict(event.data) for event in out.events if event.type == "takeover"]


def spans(out: Recorder) -> dict[str, int]:
    """How many tokens each has written, as the last event tells."""
    (end,) = [event.data for event in out.events if event.type == "chain.finished"]
    return {who: int(str(end[who])) for who in ("target", "guide", "cue")}


async def think(
    target: str, guide: str, *, max_tokens: int = 4000, **options: Any
) -> tuple[str, Recorder, Answer, ScriptedEngine]:
    """What both have made of it, as text."""
    engine = writer({"target": target, "guide": guide})
    answer, out = await play("speculative-thinking", engine, task_for(engine, max_tokens), **options)
    return engine.decode(answer.tokens), out, answer, engine


WORDS = st.sampled_from(["one. ", "Wait, ", "check ", "yes ", "\n\n", "\n\n", "so 7", "hold on", "</think>", "x" * 30])


@given(
    text=st.lists(WORDS, max_size=30).map("".join),
    limit=st.integers(1, 300),
    budget=st.sampled_from([None, 0, 20, 90]),
    n1=st.sampled_from([None, 1, 5]),
    switches=st.fixed_dictionaries(
        {name: st.booleans() for name in ("choose_large", "commit_peek", "concurrent", "begin_with_guide")}
    ),
    burst=st.integers(1, 3),
)
def test_a_guide_that_is_the_target_changes_nothing(
    text: str, limit: int, budget: int | None, n1: int | None, switches: dict[str, bool], burst: int
) -> None:
    """While no cue fires the chain is the one of `single`: tokens, phases, finish; and every token has one author."""

    async def go(name: str, **options: Any) -> tuple[Answer, Recorder, ScriptedEngine]:
        engine = writer(text, burst=burst)
        return *await play(name, engine, task_for(engine, limit, thinking_budget=budget), **options), engine

    plain, alone, _ = anyio.run(lambda: go("single"))
    answer, out, engine = anyio.run(lambda: go("speculative-thinking", n1=n1, threshold=10_000, **switches))

    assert (plain.tokens, plain.finish, plain.stopped_by) == (answer.tokens, answer.finish, answer.stopped_by)
    assert alone.tokens_of("answer") == out.tokens_of("answer")
    assert len(answer.tokens) == sum(spans(out).values())
    assert spans(out)["guide"] == sum(each["tokens"] for each in takeovers(out))
    positions = [each["position"] for each in takeovers(out)]
    assert sorted(set(positions)) == positions
    assert [] == engine.live


async def test_the_guide_writes_where_the_target_turns_reflective() -> None:
    """The target's doubt gives way to n1 tokens of the guide, then the target goes on from there."""
    text, out, _, engine = await think(
        "3*4=13.\n\nWait, no.......... so 13</think>13", "3*4=13.\n\nThat is 12, no doubt.</think>12", n1=10
    )

    assert "3*4=13.\n\nThat is 12........ so 1313" == text
    assert [{"position": 9, "tokens": 10, "kind": "draft", "label": "statement"}] == takeovers(out)
    assert {("target", True), ("target", False), ("guide", False)} == {
        (stream.job.role, bool(stream.job.stop)) for stream in engine.history
    }


async def test_a_statement_stays_the_targets_and_is_not_written_twice() -> None:
    """The peek is kept, and the guide is never asked: it would write for nothing."""
    target = "one two three.\n\nfour five six seven.</think>8"
    text, out, _, engine = await think(target, "?" * 99, n1=6)
    later, _, _, patient = await think(target, "?" * 99, n1=6, concurrent=False)

    assert target.replace("</think>", "") == text == later
    assert [] == takeovers(out)
    assert len(target) - len("</think>") + 2 == sum(s.generated for s in engine.history if s.job.role == "target")
    assert [] == [s for each in (engine, patient) for s in each.history if s.job.role == "guide"]


async def test_the_draft_begins_with_the_first_word_that_calls_for_it() -> None:
    """Beside the rest of the peek; one after the other if that is asked for, with the same result."""
    known = ScriptedEngine([""])
    texts = {"target": known.encode("a\n\nso, wait" + "." * 20), "guide": known.encode("a\n\n1234567890")}
    beside: dict[bool, list[tuple[int, str]]] = {True: [], False: []}

    async def go(concurrent: bool) -> str:
        def script(job: Job, _: int) -> tuple[int, ...]:
            if job.role == "guide":
                beside[concurrent] += [(each.generated, each.job.role) for each in engine.live]
            return texts[job.role][len(job.prompt) - len(known.encode(PROMPT)) :]

        engine = ScriptedEngine(script, roles=BOTH)
        answer, _ = await play("speculative-thinking", engine, task_for(engine, 13), n1=10, concurrent=concurrent)
        return engine.decode(answer.tokens)

    assert await go(True) == await go(False) == "a\n\n1234567890"
    assert {True: [(len("so, wait"), "target")], False: []} == beside


async def test_a_peek_may_be_thrown_away_as_the_authors_do() -> None:
    """Then its tokens are generated twice and the text is the same."""
    target = "one two three.\n\nfour five six seven.</think>8"
    _, _, answer, engine = await think(target, "?" * 99, n1=6, commit_peek=False)

    written = sum(stream.generated for stream in engine.history if stream.job.role == "target")
    assert len(answer.tokens) + 6 == written


async def test_a_kept_peek_ends_at_its_own_blank_line() -> None:
    """The target would have stopped there, so the next turn comes there."""
    text, out, _, _ = await think("one.\n\nab\n\nWait. cd.</think>1", "one.\n\nab\n\nGood. ef.</think>1", n1=5)

    assert "one.\n\nab\n\nGood. cd.1" == text
    assert [10] == [each["position"] for each in takeovers(out)]


async def test_a_draft_that_sets_out_to_verify_is_carried_on() -> None:
    """n2 more tokens by the guide, decided by what was kept."""
    _, out, _, _ = await think("a\n\nWait" + "." * 99, "a\n\ncheck:" + "v" * 99, n1=6, n2=20)
    _, doubted, _, _ = await think("a\n\ncheck" + "." * 99, "a\n\nfine.." + "v" * 99, n1=6, n2=20)

    assert [("draft", 3, 6), ("verify", 9, 20)] == [(t["kind"], t["position"], t["tokens"]) for t in takeovers(out)]
    assert ["draft"] == [each["kind"] for each in takeovers(doubted)]


async def test_with_choose_large_off_the_guide_writes_only_where_it_disagrees() -> None:
    """Doubt against doubt: the target's words stay."""
    agree, out, _, _ = await think("a\n\nWait, 1...", "a\n\nhold on....", n1=8, choose_large=False)
    other, told, _, _ = await think("a\n\nWait, 1...", "a\n\nyes! yes!..", n1=8, choose_large=False)

    assert ("a\n\nWait, 1...", []) == (agree, takeovers(out))
    assert ("a\n\nyes! yes..", ["affirmation"]) == (other, [each["label"] for each in takeovers(told)])


async def test_too_much_reflection_brings_a_cue_and_starts_the_count_anew() -> None:
    """After `threshold` doubts our sentence, n3 tokens by the guide; then more patience and a longer look."""
    doubts = "Wait..\n\n" * 40
    text, out, answer, _ = await think(doubts, doubts, n1=4, n3=10, threshold=3, cue="Hm? ", max_tokens=200)
    kinds = [each["kind"] for each in takeovers(out)]
    looks = [each["tokens"] for each in takeovers(out) if each["kind"] == "recheck"]

    assert ["draft"] * 3 + ["recheck"] + ["draft"] * 4 + ["recheck"] == kinds[:9]
    assert [10, 12, 14] == looks[:3]
    assert text.count("Hm? ") * 4 == spans(out)["cue"] > 0
    assert len(answer.tokens) == 200 == sum(spans(out).values())


async def test_a_cue_is_never_more_than_there_is_room_for() -> None:
    """Neither in the completion nor in the thinking budget."""
    doubts = "Wait..\n\n" * 40
    for limit, budget in ((20, None), (99, 20), (60, 59)):
        engine = writer(doubts + "</think>1")
        task = task_for(engine, limit, thinking_budget=budget)
        answer, out = await play("speculative-thinking", engine, task, n1=4, threshold=1, cue="c" * 12)
        assert len(answer.tokens) <= limit
        assert len(out.tokens_of("thinking")) <= (budget or limit) + 1


@pytest.mark.parametrize("n1", [3, None])
async def test_nobody_looks_on_after_the_end_of_thinking(n1: int | None) -> None:
    """In the answer blank lines and doubts are the target's own business, in one job without stop strings."""
    target = "one.\n\ntwo</think>Wait.\n\nWait.\n\ncheck"
    text, out, _, engine = await think(target, "?" * 99, n1=n1)

    assert target.replace("</think>", "") == text
    assert [] == takeovers(out)
    assert () == engine.history[-1].job.stop


@pytest.mark.parametrize("tail", ["</think>ok", "<eos>", "</think>ok\n\nWait"])
async def test_the_guide_may_end_thinking_or_all(tail: str) -> None:
    """A closing tag in the middle of its span ends all take-overs, an end of sequence everything."""
    guide = "a\n\nverify" + tail + "v" * 50
    engine = writer({"target": "a\n\nWait..</think>" + "y" * 20, "guide": guide})
    answer, out = await play("speculative-thinking", engine, task_for(engine), n1=9, n2=30)

    assert (["draft"], "stop") == ([each["kind"] for each in takeovers(out)], answer.finish)
    assert ("<eos>" in tail) == (spans(out)["target"] == 3)
    assert len(answer.tokens) == sum(spans(out).values())


async def test_a_target_that_does_not_reason_is_led_everywhere() -> None:
    """The guide begins, and writes n1 tokens after every blank line, also after a statement."""
    info = replace(SCRIPTED, think_open=(), think_close=(), context=8192)
    engine = writer("s" * 120 + "\n\nAll well.\n\nAnd so on.", info=info, prompt="q")
    task = task_for(engine, prompt="q", phase="answer")
    answer, out = await play("speculative-thinking", engine, task, n1=3)

    assert [("begin", 0, 100), ("draft", 122, 3), ("draft", 133, 3)] == [
        (each["kind"], each["position"], each["tokens"]) for each in takeovers(out)
    ]
    assert "And so on." in engine.decode(answer.tokens)


async def test_the_guide_may_be_asked_to_begin_or_not() -> None:
    """Whatever the target is."""
    _, out, _, _ = await think("t" * 9 + "</think>1", "g" * 9 + "</think>1", begin_with_guide=True, max_tokens=5)
    info = replace(SCRIPTED, think_open=(), think_close=())
    engine = writer("s" * 20, info=info, prompt="q")
    _, alone = await play("speculative-thinking", engine, task_for(engine, prompt="q"), begin_with_guide=False)

    assert [("begin", 5)] == [(each["kind"], each["tokens"]) for each in takeovers(out)]
    assert [] == takeovers(alone)


class Mortal(ScriptedEngine):
    """An engine whose guide fails at its n-th token, or is not there at all."""

    error: Exception = EngineFailed("lost")
    lives = 0

    def generate(self, job: Job) -> Any:
        """Jobs of the guide end in the error once its tokens are used up."""
        if job.role == "guide" and isinstance(self.error, Unsupported):
            raise self.error
        return super().generate(job)


def mortal(error: Exception, lives: int, text: str) -> Mortal:
    known, start = ScriptedEngine([""]), len(ScriptedEngine([""]).encode(PROMPT))
    whole = (*known.encode(text), 0)
    fails: dict[int, Any] = {}

    def script(job: Job, index: int) -> tuple[int, ...]:
        if job.role == "guide":
            fails[index] = (lives, error)
        return whole[len(job.prompt) - start :]

    engine = Mortal(script, roles=BOTH, fail=fails)
    engine.error, engine.lives = error, lives
    return engine


@pytest.mark.parametrize("error", [EngineFailed("lost"), EngineDead("gone"), Unsupported("no guide")])
@pytest.mark.parametrize("lives", [0, 1, 7])
@pytest.mark.parametrize("switches", [{}, {"concurrent": False}, {"begin_with_guide": True}, {"commit_peek": False}])
async def test_a_guide_that_is_lost_follows_the_policy(error: Exception, lives: int, switches: dict[str, bool]) -> None:
    """Go on alone with a warning, every token still accounted for; or end with the guide's own error."""
    text = "one.\n\nWait, check this: 1.\n\nyes it is.\n\nhold on.</think>Wait\n\n1"
    engine = mortal(error, lives, text)
    answer, out = await play("speculative-thinking", engine, task_for(engine), n1=8, n2=9, **switches)
    failing = mortal(error, lives, text)

    assert (*engine.encode(text), 0) == answer.tokens == out.tokens
    assert 1 == len(answer.warnings)
    assert str(error) in answer.warnings[0]
    assert len(answer.tokens) == sum(spans(out).values())
    with pytest.raises(type(error), match=str(error)):
        await play("speculative-thinking", failing, task_for(failing), n1=8, n2=9, on_guide_error="fail", **switches)
    assert [] == engine.live == failing.live


def cancel_after(count: int, concurrent: bool) -> tuple[bool, ScriptedEngine]:
    """Cancel at the `count`-th turn of emit; whether it came that far."""
    engine = writer("one.\n\nWait, check: 1.\n\nWait.\n\ntwo.\n\nthree.</think>Wait\n\n1", overrun=1)
    options = SpeculativeOptions(n1=6, n2=5, n3=4, threshold=2, concurrent=concurrent)

    async def go() -> bool:
        left = count
        with anyio.CancelScope() as scope:

            async def emit(item: Piece | Event) -> None:
                await anyio.lowlevel.checkpoint()

            async def count_steps() -> None:
                nonlocal left
                while left > 0:
                    left -= 1
                    await anyio.lowlevel.checkpoint()
                scope.cancel()

            async with anyio.create_task_group() as group:
                group.start_soon(count_steps)
                await registry.get("speculative-thinking").run(task_for(engine), engine, emit, options)
                group.cancel_scope.cancel()
        return scope.cancel_called

    return anyio.run(go), engine


@pytest.mark.parametrize("concurrent", [True, False])
def test_cancelled_at_any_moment_nothing_lives_on(concurrent: bool) -> None:
    """Also while both write, and while a draft is being given up."""
    for count in range(2000):
        cancelled, engine = cancel_after(count, concurrent)
        assert [] == engine.live, count
        if not cancelled:
            break

    assert count > 50
    assert not cancelled


async def test_limits_of_the_request_end_it_wherever_they_strike() -> None:
    """In a paragraph, a peek, a draft or a verification: the chain ends as far as it came."""
    for ceiling in range(1, 90):
        engine = writer("one.\n\nWait, check this: 1.\n\nyes it is.\n\nhold on.</think>1", ceiling=ceiling)
        answer, out = await play("speculative-thinking", engine, task_for(engine), n1=8, n2=9)
        assert answer.finish in {"ceiling", "stop"}
        assert answer.tokens == out.tokens
        assert [] == engine.live


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nothing to say", "statement"),
        ("Wait, another way", "reflection"),
        ("yes, checking", "reflection"),  # as many of both, and inside a word
        ("Yes. Yeah. Wait", "affirmation"),
        ("FINAL ANSWER", "affirmation"),
    ],
)
def test_words_label_a_text(text: str, expected: str) -> None:
    """Counted without regard to case, anywhere; a tie is doubt."""
    assert expected == label(text)


async def test_word_lists_come_plain_or_by_language() -> None:
    """Both replace the built-in ones."""
    for words in (("hmm", "moment"), {"en": ("hmm",), "de": ("moment",)}):
        _, out, _, _ = await think("a\n\nMoment mal.", "a\n\nGut so.....", n1=6, reflection=words)
        _, calm, _, _ = await think("a\n\nWait a bit.", "a\n\nGut so.....", n1=6, reflection=words)
        assert (1, 0) == (len(takeovers(out)), len(takeovers(calm)))


@pytest.mark.parametrize(
    ("context", "expected"),
    [(32768, (20, 125, 125, 15, 100)), (8192, (20, 125, 125, 15, 100)), (4096, (20, 70, 70, 8, 100))],
)
def test_numbers_left_out_scale_with_the_model(context: int, expected: tuple[int, ...]) -> None:
    """Published ones, or a small model's: its sentences are no shorter, its verifications are. What is given holds."""
    lengths = lengths_of(SpeculativeOptions(), context)
    assert expected == (lengths.n1, lengths.n2, lengths.n3, lengths.threshold, lengths.begin)
    given = lengths_of(SpeculativeOptions(n1=7, n2=8, n3=9, threshold=10), context)
    assert (7, 8, 9, 10) == (given.n1, given.n2, given.n3, given.threshold)


def test_growth_is_the_published_one() -> None:
    """125, 150, 175, 200, 200 tokens; 15, 20, 25, 30, 30 reflections. Of a small model the same share of its own."""
    lengths = lengths_of(SpeculativeOptions(), 32768)
    assert [(125, 15), (150, 20), (175, 25), (200, 30), (200, 30)] == [lengths.after(cues) for cues in range(5)]
    small = lengths_of(SpeculativeOptions(), 4096)
    assert [70, 84, 98, 112, 112] == [small.after(cues)[0] for cues in range(5)]


async def test_a_stop_string_that_ends_in_a_blank_line_ends_the_chain() -> None:
    """The blank line is the caller's, behind which nothing is written."""
    engine = writer("one</think>A\n\nB\n\nC")
    task = task_for(engine, stop=("A\n\n",))

    answer, out = await play("speculative-thinking", AnswerStops(engine, task), task)

    assert ("A\n\n", "stop") == (engine.decode(out.tokens_of("answer")), answer.finish)
