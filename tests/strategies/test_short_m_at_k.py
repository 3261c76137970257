"""short-m@k: the identities of order statistics, exactly, and every rule of the specification as a case."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import comb

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from thinkserve.strategies.engine import Answer, Event, Finish, Phase, Piece, Task
from thinkserve.strategies.errors import EngineFailed
from thinkserve.strategies.short_m_at_k import ShortOptions, run
from thinkserve.strategies.single import STOPPED_BY
from thinkserve.strategies.testing import SCRIPTED, Recorder, ScriptedEngine, play

MODES = ["wall-clock", "length-exact"]
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=8)


def chain(thinking: int, answer: str = "1") -> str:
    """A script that thinks for so many tokens."""
    return "t" * thinking + "</think>" + answer


def task_for(engine: ScriptedEngine, max_tokens: int = 200) -> Task:
    """Any question."""
    return Task(engine.encode("q<think>"), max_tokens)


def race(engine: ScriptedEngine, max_tokens: int = 200, **options: object) -> tuple[Answer, Recorder]:
    """Run short-m@k to its end."""

    async def go() -> tuple[Answer, Recorder]:
        return await play("short-m-at-k", engine, task_for(engine, max_tokens), **options)

    return anyio.run(go)


def thinking_steps(engine: ScriptedEngine) -> list[int]:
    """Per chain: steps spent on thinking, the closing tag's own step included."""
    counts = []
    for stream in engine.history:
        close = engine.info().think_close[0]
        counts.append(stream.tokens.index(close) + 1 if close in stream.tokens else stream.generated)
    return counts


@pytest.mark.parametrize("mode", MODES)
@given(lengths=LENGTHS, data=st.data())
def test_thinking_compute_is_the_sum_of_lengths_cut_at_the_mth(
    mode: str, lengths: list[int], data: st.DataObject
) -> None:
    """Sum over chains of min(L_i, L_(m)), where a length includes the step of the closing tag."""
    m = data.draw(st.integers(1, len(lengths)))
    engine = ScriptedEngine([chain(length) for length in lengths])

    race(engine, k=len(lengths), m=m, mode=mode)

    cut = sorted(lengths)[m - 1] + 1
    assert [min(length + 1, cut) for length in lengths] == thinking_steps(engine)


@pytest.mark.parametrize("mode", MODES)
@given(lengths=LENGTHS, data=st.data())
def test_the_selected_set_is_the_offline_top_m(mode: str, lengths: list[int], data: st.DataObject) -> None:
    """Replayed traces: the voters are the m shortest by (length, index), and exactly m vote."""
    m = data.draw(st.integers(1, len(lengths)))
    engine = ScriptedEngine([chain(length) for length in lengths])

    answer, out = race(engine, k=len(lengths), m=m, mode=mode)

    best = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))[:m]
    voted = [event.data["voters"] for event in out.events if event.type == "vote"]
    assert best[0] == answer.winner
    assert [best] * (len(lengths) > 1) == voted


@given(lengths=LENGTHS, data=st.data())
def test_length_exact_selects_the_same_set_whatever_the_pace(lengths: list[int], data: st.DataObject) -> None:
    """Slow chains that are shorter displace fast ones that are longer."""
    m = data.draw(st.integers(1, len(lengths)))
    pace = dict(enumerate(data.draw(st.lists(st.integers(1, 6), min_size=len(lengths), max_size=len(lengths)))))
    engine = ScriptedEngine([chain(length) for length in lengths], pace=pace)

    _, out = race(engine, k=len(lengths), m=m, mode="length-exact")

    best = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))[:m]
    voted = [event.data["voters"] for event in out.events if event.type == "vote"]
    assert [best] * (len(lengths) > 1) == voted


@given(lengths=st.lists(st.integers(0, 30), min_size=2, max_size=8), m=st.integers(1, 8))
def test_time_does_not_grow_with_k(lengths: list[int], m: int) -> None:
    """At fixed m, one more chain never makes thinking last longer."""
    m = min(m, len(lengths) - 1)

    def time(k: int) -> int:
        engine = ScriptedEngine([chain(length) for length in lengths[:k]])
        race(engine, k=k, m=m)
        return max(thinking_steps(engine))

    assert time(len(lengths)) <= time(len(lengths) - 1)


@given(lengths=LENGTHS, answers=st.lists(st.sampled_from(["1", "2", "none"]), min_size=8, max_size=8))
def test_majority_is_the_case_of_m_equal_to_k(lengths: list[int], answers: list[str]) -> None:
    """Same chains, same tokens, same votes, same winner."""
    scripts = [chain(length, answer) for length, answer in zip(lengths, answers, strict=False)]
    ours, theirs = ScriptedEngine(scripts), ScriptedEngine(scripts)

    async def majority() -> tuple[Answer, Recorder]:
        return await play("majority", theirs, task_for(theirs), k=len(lengths))

    assert anyio.run(majority)[0] == race(ours, k=len(lengths), m=len(lengths))[0]
    assert theirs.generated == ours.generated


@given(length=st.integers(0, 40), max_tokens=st.integers(1, 60), burst=st.integers(1, 3))
def test_one_chain_is_single_token_by_token(length: int, max_tokens: int, burst: int) -> None:
    """k=1: the same pieces, cut in the same places, and the same end."""
    ours, theirs = (ScriptedEngine([chain(length)], burst=burst) for _ in range(2))

    async def single() -> tuple[Answer, Recorder]:
        return await play("single", theirs, task_for(theirs, max_tokens))

    answer, out = race(ours, max_tokens, k=1)
    expected, expected_out = anyio.run(single)

    assert expected_out.pieces == out.pieces
    assert (expected.tokens, expected.finish, expected.stopped_by) == (answer.tokens, answer.finish, answer.stopped_by)


def test_the_vote_is_among_the_shortest_only() -> None:
    """The long chains' answer has a majority of k and loses."""
    scripts = [chain(30, "1"), chain(5, "2"), chain(31, "1"), chain(6, "2"), chain(32, "1"), chain(7, "3")]
    engine = ScriptedEngine(scripts)

    answer, _ = race(engine, k=6, m=3)

    assert (1, {"2": 2, "3": 1}, "m_reached") == (answer.winner, dict(answer.votes), answer.stopped_by)
    assert [True, False] * 3 == [stream.aborted for stream in engine.history]


def test_no_piece_goes_out_before_several_have_voted() -> None:
    """With m > 1 the first to finish may lose, so only the winner is ever emitted."""
    engine = ScriptedEngine([chain(3, "1"), chain(5, "2"), chain(7, "2")])

    answer, out = race(engine, k=3, m=3)

    assert answer.winner == 1
    assert out.tokens == engine.encode(chain(5, "2") + "<eos>")


@pytest.mark.parametrize(
    ("lengths", "m", "voters"),
    [([4, 4, 4], 1, [0]), ([9, 4, 4], 1, [1]), ([4, 3, 4, 4], 3, [1, 0, 2]), ([5, 5], 2, [0, 1])],
)
@pytest.mark.parametrize("mode", MODES)
def test_chains_that_finish_together_are_ordered_by_index(
    mode: str, lengths: list[int], m: int, voters: list[int]
) -> None:
    """And exactly m vote."""
    engine = ScriptedEngine([chain(length) for length in lengths])

    _, out = race(engine, k=len(lengths), m=m, mode=mode)

    assert [voters] == [event.data["voters"] for event in out.events if event.type == "vote"]


def test_the_clock_decides_in_wall_clock_mode() -> None:
    """A short chain that the engine keeps waiting loses; in length-exact mode it wins."""
    scripts, pace = [chain(10, "1"), chain(3, "2"), chain(12, "1")], {1: 9}

    by_clock = race(ScriptedEngine(scripts, pace=pace), k=3, m=1)[0]
    by_length = race(ScriptedEngine(scripts, pace=pace), k=3, m=1, mode="length-exact")[0]

    assert (0, 1) == (by_clock.winner, by_length.winner)


def test_a_displaced_member_is_aborted_while_it_answers() -> None:
    """Length-exact: the laggard's finish stops the answer of whom it displaces."""
    engine = ScriptedEngine([chain(5, "long answer 1" * 9), chain(4, "2")], pace={1: 3})

    answer, out = race(engine, k=2, m=1, mode="length-exact")

    assert (1, [True, False]) == (answer.winner, [stream.aborted for stream in engine.history])
    assert ("chain.aborted", 0) in [(event.type, event.chain) for event in out.events]


def test_a_laggard_that_has_become_too_long_is_stopped() -> None:
    """Length-exact: it may run on until it is longer than the m-th, and no further."""
    engine = ScriptedEngine([chain(3), chain(200)], pace={1: 9})

    race(engine, k=2, m=1, mode="length-exact")

    assert thinking_steps(engine) == [4, 3]


def test_an_empty_think_block_has_finished() -> None:
    """Length 0 is the shortest, not an unfinished chain."""
    answer, _ = race(ScriptedEngine([chain(9, "1"), chain(0, "2")]), k=2, m=1)

    assert 1 == answer.winner


def test_fewer_than_m_vote_when_the_others_run_out() -> None:
    """Those who finished decide."""
    engine = ScriptedEngine([chain(500, "1"), chain(5, "2"), chain(500, "1")])

    answer, _ = race(engine, 60, k=3, m=3)

    assert (1, {"2": 1}, "stop", "length") == (answer.winner, dict(answer.votes), answer.finish, answer.stopped_by)


def test_an_answer_is_forced_when_nobody_finishes() -> None:
    """From the longest chain, within the limit, marked in every way; the extra job is counted like any other."""
    engine = ScriptedEngine([chain(500, "it is 7")], fail={0: (20, EngineFailed("gone"))})

    answer, out = race(engine, 40, k=3, m=2)

    assert engine.encode("t" * 29 + "</think>it is 7<eos>") == answer.tokens == out.tokens
    assert engine.encode("it is 7<eos>") == out.tokens_of("answer")
    assert (1, "stop", "length") == (answer.winner, answer.finish, answer.stopped_by)
    assert any("forced" in warning for warning in answer.warnings)
    assert [1] == [event.chain for event in out.events if event.type == "budget.forced"]
    assert 20 + 40 + 40 + 8 == engine.generated
    assert 4 == len({stream.job.seed for stream in engine.history})


def test_a_chain_that_ends_inside_its_thinking_is_not_finished() -> None:
    """The end of sequence before the closing tag: an answer is forced without it."""
    engine = ScriptedEngine(["never closed", "nor this"])

    answer, out = race(engine, 100, k=2, m=1)

    assert engine.encode("never closed</think>") == out.tokens_of("thinking")
    assert (0, "length") == (answer.winner, answer.stopped_by)


def test_nothing_is_forced_without_room_for_it() -> None:
    """With three tokens there is no quarter to spare: the longest chain as it is."""
    answer, out = race(ScriptedEngine([chain(50)]), 3, k=2, m=1)

    assert (3, "length", "length") == (len(answer.tokens), answer.finish, answer.stopped_by)
    assert "budget.forced" not in [event.type for event in out.events]


@pytest.mark.parametrize(("limit", "at"), [("ceiling", 40), ("deadline", 20)])
def test_a_limit_of_the_request_leaves_what_there_is(limit: Finish, at: int) -> None:
    """Nobody closed: the longest chain as it is, nothing forced, and the reason told."""
    engine = ScriptedEngine([chain(500)], **{limit: at})  # type: ignore[arg-type]

    answer, out = race(engine, k=2, m=1)

    assert (STOPPED_BY[limit], limit) == (answer.stopped_by, answer.finish)
    assert "t" * 20 == engine.decode(out.tokens)


def test_a_chain_cut_in_its_answer_counts_all_the_same() -> None:
    """Its thinking was closed when the request's tokens ran out."""
    engine = ScriptedEngine([chain(4, "1 and more"), chain(500, "2")], ceiling=14)

    answer, _ = race(engine, k=2, m=2)

    assert (0, {"1": 1}, "ceiling", "budget") == (
        answer.winner,
        dict(answer.votes),
        answer.finish,
        answer.stopped_by,
    )


def test_a_member_that_was_cut_in_its_answer_counts_as_one_but_does_not_vote_against_a_complete_one() -> None:
    """The third chain is stopped all the same, and who is complete decides."""
    engine = ScriptedEngine([chain(3, "the result is 12"), chain(5, "12"), chain(500)], ceiling=34)

    answer, _ = race(engine, k=3, m=2)

    assert [False, False, True] == [stream.aborted for stream in engine.history]
    assert (1, {"12": 1}, "budget") == (answer.winner, dict(answer.votes), answer.stopped_by)


def test_without_tags_chains_finish_with_their_text() -> None:
    """The length is that of the whole text then."""
    engine = ScriptedEngine(
        ["the answer is 1", "it is 2", "so 3"], info=replace(SCRIPTED, think_open=(), think_close=())
    )

    answer, out = race(engine, k=3, m=2)

    assert (2, "m_reached") == (answer.winner, answer.stopped_by)
    assert {"answer"} == {piece.phase for piece in out.pieces}


@pytest.mark.parametrize("phase", ["answer", None])
@pytest.mark.anyio
async def test_without_thinking_chains_finish_with_their_text(phase: Phase | None) -> None:
    """The model has tags but does not use them here."""
    engine = ScriptedEngine(["the answer is 1", "so 2"])

    answer, _ = await play("short-m-at-k", engine, Task(engine.encode("q"), 99, phase=phase), k=2, m=1)

    assert (1, engine.encode("so 2<eos>")) == (answer.winner, answer.tokens)


@pytest.mark.anyio
async def test_the_only_voter_streams_while_it_writes() -> None:
    """m=1: every piece goes out before the engine writes the next token; the loser has stopped."""
    engine = ScriptedEngine([chain(9, "1"), chain(3, "a long answer: 2")])
    written: list[int] = []

    async def emit(item: Piece | Event) -> None:
        if isinstance(item, Piece):
            written.append(engine.history[1].generated)

    await run(task_for(engine), engine, emit, ShortOptions(k=2, m=1))

    assert list(range(4, 4 + len(written))) == written
    assert 4 == engine.history[0].generated


@pytest.mark.parametrize(
    ("failing", "winner", "warned"), [({1}, 2, 1), ({1, 2}, 0, 2), ({0}, 1, 0)], ids=["one", "two", "a loser"]
)
def test_others_take_the_place_of_failed_chains(failing: set[int], winner: int, warned: int) -> None:
    """As long as one is left; a chain that was aborted before it could fail is no failure."""
    engine = ScriptedEngine(
        [chain(20, "1"), chain(6, "2"), chain(8, "3")],
        fail={i: (5 if i else 19, EngineFailed("lost")) for i in failing},
    )

    answer, _ = race(engine, k=3, m=1)

    assert (winner, warned) == (answer.winner, len(answer.warnings))


def test_a_member_that_fails_in_its_answer_has_no_vote() -> None:
    """The other members decide."""
    engine = ScriptedEngine([chain(3, "1 1 1"), chain(5, "2"), chain(9, "3")], fail={0: (8, EngineFailed("lost"))})

    answer, _ = race(engine, k=3, m=2)

    assert (1, {"2": 1}) == (answer.winner, dict(answer.votes))


@pytest.mark.parametrize(
    ("options", "where"),
    [({"k": 2, "m": 3}, ("m",)), ({"k": 0}, ("k",)), ({"k": 65}, ("k",)), ({"m": 0}, ("m",)), ({"n": 1}, ("n",))],
)
def test_impossible_options_are_refused_at_the_field(options: dict[str, int], where: tuple[str]) -> None:
    """The error's location names the parameter to change."""
    with pytest.raises(ValidationError) as caught:
        ShortOptions.model_validate(options)

    assert [where] == [error["loc"] for error in caught.value.errors()]


def test_m_defaults_to_three_or_to_k() -> None:
    """So that k=2 alone makes sense."""
    assert [3, 2, 1] == [ShortOptions(k=k).m for k in (8, 2, 1)]
    assert 8 == ShortOptions().chains()


@given(lengths=st.lists(st.integers(0, 40), min_size=4, max_size=5), k=st.integers(2, 4))
def test_the_mean_over_all_draws_of_k_is_the_unbiased_estimate(lengths: list[int], k: int) -> None:
    """Of n chains, short-1@k answers as the i-th shortest in C(n - i, k - 1) of C(n, k) draws (section 1)."""

    def winner(drawn: tuple[int, ...]) -> int:
        answer, _ = race(ScriptedEngine([chain(lengths[at]) for at in drawn]), k=k, m=1)
        return lengths[drawn[answer.winner]]

    n, draws = len(lengths), list(combinations(range(len(lengths)), k))
    estimate = sum(comb(n - i, k - 1) * length for i, length in enumerate(sorted(lengths), 1)) / comb(n, k)

    assert pytest.approx(estimate) == sum(map(winner, draws)) / len(draws)
