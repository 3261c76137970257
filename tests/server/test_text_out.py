"""Committed tokens become two texts: exact borders, exact stops, the same text however the tokens are sliced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.server.answer_stops import Matcher
from thinkserve.server.plan import Plan
from thinkserve.server.text_out import SLICE, TextOut
from thinkserve.strategies import registry
from thinkserve.strategies.engine import Delta, Piece, Role, Task
from thinkserve.strategies.pieces import Transcript
from thinkserve.strategies.pieces import stopped as has_stopped
from thinkserve.strategies.testing import SCRIPTED, ScriptedEngine

# Tags spelled with ordinary tokens: "[T]" and "[/T]", which decode to text unless they are taken out.
SPELLED_TAGS = replace(
    SCRIPTED, think_open=ScriptedEngine([]).encode("[T]"), think_close=ScriptedEngine([]).encode("[/T]")
)


def plan(stop: tuple[str, ...] = (), *, logprobs: int | None = None, include_reasoning: bool = True) -> Plan:
    single = registry.get("single")
    task = Task(prompt=(5,), max_tokens=100, logprobs=logprobs, stop=stop)
    return Plan("req_1", "m", task, single, single.options(), include_reasoning=include_reasoning)


def pieces(engine: ScriptedEngine, thoughts: str, answer: str, cuts: Sequence[int] = ()) -> list[Piece]:
    """Tags and thoughts as thinking, the rest as answer, sliced at `cuts`."""
    out: list[Piece] = []
    for phase, text in (("thinking", thoughts), ("answer", answer)):
        tokens = engine.encode(text)
        edges = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
        out += [Piece(phase, tokens[a:b], tuple(-t / 100 for t in tokens[a:b])) for a, b in pairwise(edges)]  # type: ignore[arg-type]
    return out


def shown(
    stop: tuple[str, ...], items: list[Piece], engine: ScriptedEngine | None = None
) -> tuple[str, str, str | None]:
    """What a stream would have sent, which must equal what the object accumulated."""
    out = TextOut(engine or ScriptedEngine([]), plan(stop))
    sent = [delta for item in items for delta in out.push(item)] + out.flush()
    assert all(text for _, text in sent)
    reasoning, content = ("".join(t for p, t in sent if p == phase) for phase in ("thinking", "answer"))
    assert (reasoning, content) == (out.reasoning, out.content)
    return reasoning, content, out.stopped


def test_tags_belong_to_neither_text() -> None:
    """Thoughts lose the line break after the tag; the answer is exactly what follows the closing tag."""
    items = pieces(ScriptedEngine([]), "<think>\nlet me see\n</think>", "\n\n42<eos>")
    assert shown((), items) == ("let me see\n", "\n\n42", None)


def test_a_second_closing_tag_inside_the_answer_is_dropped() -> None:
    """Models sometimes close thinking twice."""
    assert shown((), pieces(ScriptedEngine([]), "a</think>", "</think>b")) == ("a", "b", None)


@given(cuts=st.lists(st.integers(0, 40), max_size=8))
def test_tags_of_several_tokens_are_recognised_however_they_are_sliced(cuts: list[int]) -> None:
    """And what only looks like the beginning of one stays text."""
    engine = ScriptedEngine([], info=SPELLED_TAGS)
    items = pieces(engine, "[T]a[b [/c[[/T]", "d[/T]e[", cuts)
    assert shown((), items, engine) == ("a[b [/c[", "de[", None)


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=30),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_text_does_not_depend_on_how_tokens_are_sliced(text: str, cuts: list[int]) -> None:
    """Not even inside a character."""
    items = pieces(ScriptedEngine([]), "t" + text + "</think>", text, cuts)
    assert shown((), items) == ("t" + text, text, None)


@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=10),
)
def test_a_stop_string_cuts_the_answer_at_the_same_place_however_it_arrives(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    """The first stop string to be complete wins; it is not shown, and thoughts may hold it."""
    ends = sorted((text.find(s) + len(s), text.find(s), s) for s in stop if s in text)
    expected = (text, text[: ends[0][1]], ends[0][2]) if ends else (text, text, None)
    assert shown(tuple(stop), pieces(ScriptedEngine([]), text, text, cuts)) == expected


def test_text_that_may_begin_a_stop_string_is_held_back_and_nothing_else() -> None:
    """The stream never shows what must be taken back, and delays no more than that."""
    engine = ScriptedEngine([])
    out = TextOut(engine, plan(("END",)))
    assert out.push(Piece("answer", engine.encode("xE"))) == [("answer", "x")]
    assert out.push(Piece("answer", engine.encode("N"))) == []
    assert out.push(Piece("answer", engine.encode("O"))) == [("answer", "ENO")]
    assert out.push(Piece("answer", engine.encode("yEN"))) == [("answer", "y")]
    assert out.flush() == [("answer", "EN")]
    assert out.stopped is None


def test_nothing_comes_after_a_stop() -> None:
    """Further pieces are swallowed."""
    engine = ScriptedEngine([])
    out = TextOut(engine, plan(("b",)))
    assert out.push(Piece("answer", engine.encode("abc"))) == [("answer", "a")]
    assert out.stopped == "b"
    assert out.push(Piece("answer", engine.encode("d"))) == out.flush() == []
    assert out.content == "a"


def test_thoughts_that_the_client_excluded_are_not_shown() -> None:
    """The answer is unaffected."""
    out = TextOut(ScriptedEngine([]), plan(include_reasoning=False))
    sent = [delta for item in pieces(ScriptedEngine([]), "why</think>", "42") for delta in out.push(item)]
    assert sent == [("answer", "42")]
    assert out.reasoning == ""


@given(
    text=st.text("abé€", max_size=12),
    stop=st.sampled_from([(), ("a",), ("bb", "ab")]),
    cuts=st.lists(st.integers(0, 40)),
)
def test_logprob_entries_cover_exactly_the_tokens_shown(text: str, stop: tuple[str, ...], cuts: list[int]) -> None:
    """One entry per token of the visible answer, none for thoughts, the end token or what a stop string cut off."""
    engine = ScriptedEngine([])
    out = TextOut(engine, plan(stop, logprobs=0))
    for item in pieces(engine, "why</think>", text + "<eos>", cuts):
        out.push(item)
    out.flush()
    visible = engine.encode(out.content)
    assert [entry["logprob"] for entry in out.logprobs] == [-t / 100 for t in visible]
    assert out.take_logprobs() == out.logprobs
    assert out.take_logprobs() == []


@pytest.mark.parametrize("lowest", [float("-inf"), -1e30])
def test_alternatives_are_listed_and_minus_infinity_becomes_a_number(lowest: float) -> None:
    """JSON has no infinities."""
    engine = ScriptedEngine([])
    a, b = engine.encode("ab")
    out = TextOut(engine, plan(logprobs=2))
    out.push(Piece("answer", (a,), (-0.5,), (((a, -0.5), (b, lowest)),)))
    assert out.logprobs[0]["top_logprobs"] == [
        {"token": "a", "logprob": -0.5, "bytes": [97]},
        {"token": "b", "logprob": -9999.0, "bytes": [98]},
    ]


def long_piece(engine: ScriptedEngine, count: int) -> Piece:
    """An answer of `count` tokens, each with two alternatives."""
    tokens = (engine.encode("aé€ b") * count)[:count]
    top = tuple(((token, -0.5), (token + 1, -1.5)) for token in tokens)
    return Piece("answer", tokens, tuple(-n / 10 for n in range(count)), top)


@pytest.mark.parametrize("count", [0, 1, SLICE, SLICE + 1, 5 * SLICE])
@pytest.mark.parametrize("stop", [(), ("b" + "aé€ " * 30,)])
def test_slices_of_a_piece_are_the_piece(count: int, stop: tuple[str, ...]) -> None:
    """Same text, same entries, none of them large."""
    engine = ScriptedEngine([])
    piece = long_piece(engine, count)
    whole, sliced = (TextOut(engine, plan(stop, logprobs=2)) for _ in range(2))
    parts = list(sliced.slices(piece))
    whole.push(piece)
    for part in parts:
        sliced.push(part)
    for out in (whole, sliced):
        out.flush()
    assert all(len(part.tokens) <= SLICE for part in parts)
    assert (sliced.content, sliced.stopped, sliced.logprobs) == (whole.content, whole.stopped, whole.logprobs)


def test_only_log_probabilities_are_worth_slicing() -> None:
    """Thoughts, and answers without them, are decoded at once."""
    piece = long_piece(ScriptedEngine([]), 10 * SLICE)
    assert list(TextOut(ScriptedEngine([]), plan()).slices(piece)) == [piece]
    thoughts = replace(piece, phase="thinking")
    assert list(TextOut(ScriptedEngine([]), plan(logprobs=2)).slices(thoughts)) == [thoughts]


def test_a_token_is_spelled_once() -> None:
    """However often it is among the alternatives."""

    class Counting(ScriptedEngine):
        spelled = 0

        def decode(self, tokens: Sequence[int], role: Role = "target") -> str:
            self.spelled += 1
            return super().decode(tokens, role)

    engine = Counting([])
    piece = long_piece(engine, 200)
    out = TextOut(engine, plan(logprobs=2))
    out.push(piece)
    assert engine.spelled == len({token for pairs in piece.top for token, _ in pairs})
    whole = [entry for entry in out.logprobs if entry["token"] != "\ufffd"]
    assert whole
    assert all(entry["bytes"] == list(entry["token"].encode()) for entry in whole)


def test_a_part_of_a_character_has_no_bytes_that_are_not_its_own() -> None:
    """Joined they would not be the text; they are not known here."""
    engine = ScriptedEngine([])
    out = TextOut(engine, plan(logprobs=0))
    tokens = engine.encode("a€")
    out.push(Piece("answer", tokens, (-0.5,) * len(tokens)))
    assert [[97], None, None, None] == [entry["bytes"] for entry in out.logprobs]


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2, 3, 4, 5, 6, 7)])
@pytest.mark.parametrize(
    ("stop", "content", "stopped"),
    [
        (("\n\n",), "\n\nIt is 7.", "\n\n"),
        (("\n",), "\n\nIt is 7.", "\n"),
        (("\n\nIt", "\n\n"), "", "\n\nIt"),
        (("\n\nQuestion", "\n\n"), "\n\nIt is 7.", "\n\n"),
        ((" ", "nowhere"), "\n\nIt", " "),
    ],
)
def test_white_space_between_thoughts_and_answer_is_no_stop(
    stop: tuple[str, ...], content: str, stopped: str, cuts: tuple[int, ...]
) -> None:
    """Templates put it there; alone it ends nothing, whoever looks for it."""
    engine = ScriptedEngine(["t</think>\n\nIt is 7.\n\nNext"])
    out = TextOut(engine, plan(stop))
    for piece in pieces(engine, "t", "\n\nIt is 7.\n\nNext", cuts):
        out.push(piece)
    assert (content, stopped) == (out.content, out.stopped)

    matcher = Matcher(engine, Task(prompt=(5,), max_tokens=100, stop=stop))
    ended = "t</think>" + content + stopped
    assert len(engine.encode(ended)) == matcher.find(engine.encode("t</think>\n\nIt is 7.\n\nNext"))
    transcript = Transcript(engine.info(), "thinking")
    transcript.push(Delta(engine.encode("t</think>\n\n")))
    assert not has_stopped(transcript, Task(prompt=(5,), max_tokens=100, stop=stop), engine)
