"""Transcript: from deltas to pieces, nothing lost, everything in parallel."""

from __future__ import annotations

from dataclasses import astuple
from itertools import pairwise
from math import isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.strategies.engine import Delta, ModelInfo, Phase, Piece
from thinkserve.strategies.pieces import Transcript, injected

INFO = ModelInfo("m", 99, 99, eos=(0,), think_open=(1, 1), think_close=(2, 3))


def delta_of(tokens: list[int], last: bool) -> Delta:
    """A delta whose log-probabilities and alternatives tell which token they belong to."""
    return Delta(
        tuple(tokens),
        tuple(float(token) for token in tokens),
        tuple(((token, float(token)),) for token in tokens),
        "stop" if last else None,
    )


def pieces_of(phase: Phase | None, *deltas: Delta) -> list[list[Piece]]:
    """What can be taken after each delta."""
    transcript = Transcript(INFO, phase)
    taken = []
    for delta in deltas:
        transcript.push(delta)
        taken.append(transcript.take())
    return taken


@given(
    st.sampled_from(["thinking", "answer", None]),
    st.lists(st.lists(st.integers(1, 4), max_size=6), min_size=1, max_size=6),
)
def test_pieces_add_up_to_the_deltas(phase: Phase | None, parts: list[list[int]]) -> None:
    """Every token comes out once and in order, with its own log-probability and alternatives."""
    deltas = [delta_of(part, at == len(parts) - 1) for at, part in enumerate(parts)]

    pieces = [piece for taken in pieces_of(phase, *deltas) for piece in taken]

    assert [token for piece in pieces for token in piece.tokens] == [token for part in parts for token in part]
    assert all(piece.logprobs == tuple(float(token) for token in piece.tokens) for piece in pieces)
    assert all(piece.top == tuple(((token, float(token)),) for token in piece.tokens) for piece in pieces)


@given(
    st.sampled_from(["thinking", "answer", None]),
    st.lists(st.lists(st.integers(1, 4), max_size=6), min_size=1, max_size=6),
)
def test_taking_late_gives_fewer_pieces_of_the_same_tokens(phase: Phase | None, parts: list[list[int]]) -> None:
    """Neighbours differ in phase, and the answer is what is labelled so."""
    transcript = Transcript(INFO, phase)
    for at, part in enumerate(parts):
        transcript.push(delta_of(part, at == len(parts) - 1))

    pieces = transcript.take()

    assert all(a.phase != b.phase for a, b in pairwise(pieces))
    assert [token for piece in pieces for token in piece.tokens] == transcript.tokens
    assert tuple(t for piece in pieces if piece.phase == "answer" for t in piece.tokens) == transcript.answer
    assert transcript.take() == []


def test_a_delta_across_the_border_becomes_two_pieces() -> None:
    """The tag goes with the thinking."""
    assert pieces_of("thinking", Delta((7, 2, 3, 8))) == [[Piece("thinking", (7, 2, 3)), Piece("answer", (8,))]]


def test_what_may_be_a_tag_waits_for_the_next_delta() -> None:
    """Half an opening tag is neither thinking nor answer yet."""
    assert pieces_of(None, Delta((1,)), Delta((1,))) == [[], [Piece("thinking", (1, 1))]]


def test_the_end_of_the_stream_brings_out_what_was_held() -> None:
    """Half a tag at the end is text."""
    assert pieces_of(None, Delta((1,), finish="stop")) == [[Piece("answer", (1,))]]


@pytest.mark.parametrize(("logprobs", "top"), [(None, ()), (0, ()), (2, ((), ()))])
def test_tokens_of_ours_are_certain_and_without_alternatives(logprobs: int | None, top: tuple[tuple[()], ...]) -> None:
    """In parallel to what a job with so many alternatives gives."""
    assert Delta((5, 6), (0.0, 0.0), top) == injected((5, 6), logprobs)


def test_of_tokens_of_ours_no_statistics_are_known() -> None:
    """For a job that asks for them there is one for each token, and no number in it."""
    stats = injected((5, 6), None, stats=True).stats
    assert [True] * 8 == [isnan(number) for each in stats for number in astuple(each)]
