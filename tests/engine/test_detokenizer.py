"""Incremental decoding equals decoding at once, for any ids cut anywhere, and never shows half a character."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from thinkserve.server.detokenizer import ByteDetokenizer, WindowDetokenizer, byte_table
from thinkserve.strategies.engine import Detokenizer


def byte_level() -> Tokenizer:
    """256 bytes, a merge inside a character, a special token, a plain added token and one with a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)} | {"Ã©": 256, "Ġthe": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ã", "©")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<a b>", normalized=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """A Llama-2-like tokenizer: pieces with a leading underline, and single bytes for everything else."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁a", "cat", "é", "s"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return tokenizer


BYTES, FALLBACK = byte_level(), byte_fallback()
TABLE = byte_table(BYTES)


def fresh(tokenizer: Tokenizer) -> Detokenizer:
    """The decoder that the server would take for this tokenizer."""
    table = byte_table(tokenizer)
    return WindowDetokenizer(tokenizer.decode) if table is None else ByteDetokenizer(table)


def pieces(decoder: Detokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    """Push the ids in groups whose sizes are `cuts`, then flush."""
    out, at = [], 0
    for size in [*cuts, len(ids)]:
        out.append(decoder.push(ids[at : at + size]))
        at += size
    return [*out, decoder.flush()]


def test_each_kind_of_tokenizer_gets_its_decoder() -> None:
    """Byte-level tokenizers have a table, others have none."""
    assert isinstance(fresh(BYTES), ByteDetokenizer)
    assert isinstance(fresh(FALLBACK), WindowDetokenizer)


@given(ids=st.lists(st.integers(0, 260), max_size=80), cuts=st.lists(st.integers(0, 4), max_size=80))
def test_random_bytes_decode_as_at_once(ids: list[int], cuts: list[int]) -> None:
    """Also where the bytes are no UTF-8 at all."""
    assert "".join(pieces(fresh(BYTES), ids, cuts)) == BYTES.decode(ids)


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte-level", "byte-fallback"])
@given(text=st.text(max_size=60), cuts=st.lists(st.integers(0, 3), max_size=120))
def test_text_never_shows_half_a_character(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    """No piece holds a replacement character that the text does not hold, and the pieces make up the text."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole, out = tokenizer.decode(ids), pieces(fresh(tokenizer), ids, cuts)
    assert "".join(out) == whole
    assert sum(piece.count("\ufffd") for piece in out[:-1]) <= whole.count("\ufffd")


@given(prefix=st.lists(st.integers(257, 262), max_size=200), cuts=st.lists(st.integers(0, 3), max_size=90))
def test_a_window_forgets_only_what_cannot_change(prefix: list[int], cuts: list[int]) -> None:
    """Long texts of pieces with and without leading spaces come out as at once."""
    assert "".join(pieces(fresh(FALLBACK), prefix, cuts)) == FALLBACK.decode(prefix)


def test_special_tokens_have_no_text_and_added_tokens_have_their_own() -> None:
    """As in `decode`: the end token vanishes, tags and tokens with a space stay."""
    ids = [BYTES.get_vocab()[text] for text in ("<think>", "<|end|>", "Ġthe", "<a b>")]
    assert "".join(pieces(fresh(BYTES), ids, [1, 1, 1])) == "<think> the<a b>" == BYTES.decode(ids)


def test_an_unfinished_character_waits_for_flush() -> None:
    """Two of three bytes of a euro sign are held back; at the end they are one replacement character."""
    ids = BYTES.encode("€").ids
    decoder = fresh(BYTES)
    assert [decoder.push([token]) for token in ids[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd"


def test_decoding_is_cheap() -> None:
    """Far below 15 microseconds a token, best of five, so that a busy machine does not fail it."""
    assert TABLE is not None
    ids, best = [index % 256 for index in range(20_000)], float("inf")
    for _ in range(5):
        decoder, start = ByteDetokenizer(TABLE), time.perf_counter()
        for token in ids:
            decoder.push((token,))
        best = min(best, (time.perf_counter() - start) / len(ids))
    assert best < 15e-6
