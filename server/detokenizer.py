"""Incremental decoding of token ids: what is certain comes out at once, a broken character never.

Byte-level tokenizers (Qwen, Llama 3, DeepSeek, the embedded models) are decoded from a table of bytes and one UTF-8
decoder. Any other tokenizer is decoded in windows, which are closed at a point where the text cannot change any more.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence

from tokenizers import Tokenizer


class ByteDetokenizer:
    """Decoder of one sequence over a table from token id to bytes; ids outside the table have no text."""

    __slots__ = ("_decode", "_table")

    def __init__(self, table: Mapping[int, bytes]) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, tokens: Sequence[int]) -> str:
        """Text that is now certain; the bytes of an unfinished character wait."""
        table = self._table
        return self._decode(b"".join([table.get(token, b"") for token in tokens]))

    def flush(self) -> str:
        """What was held back: a replacement character if the text ends inside a character."""
        return self._decode(b"", True)


class WindowDetokenizer:
    """Decoder of one sequence through a decode function alone: text is the growth of a short window's decoding."""

    __slots__ = ("_decode", "_shown", "_window")
    _CONTEXT = 8
    # Bytes that are no text at all come out as replacement characters after so many tokens.
    _PATIENCE = 64

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Text that is now certain; replacement characters at the end wait, they may still become a character."""
        self._window += tokens
        text = self._decode(self._window)
        if text.endswith("\ufffd") or not text.startswith(self._shown):
            return "" if len(self._window) < self._PATIENCE else self._grow(text)
        new = self._grow(text)
        self._forget(text)
        return new

    def flush(self) -> str:
        """What was held back."""
        return self._grow(self._decode(self._window))

    def _grow(self, text: str) -> str:
        new, self._shown = text[len(self._shown) :], text
        return new

    def _forget(self, text: str) -> None:
        """Drop all but a few tokens of left context, unless the cut would go through a character."""
        if len(self._window) > 2 * self._CONTEXT:
            tail = self._decode(self._window[-self._CONTEXT :])
            if text.endswith(tail) and "\ufffd" not in tail:
                self._window, self._shown = self._window[-self._CONTEXT :], tail


def byte_table(tokenizer: Tokenizer) -> dict[int, bytes] | None:
    """Bytes of every token of a byte-level tokenizer, special tokens left out; None when it is not byte-level."""
    config = json.loads(tokenizer.to_str())
    if (config.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    special = {entry["id"] for entry in config.get("added_tokens", ()) if entry["special"]}
    alphabet = _byte_alphabet()
    return {
        token: _token_bytes(text, alphabet)
        for text, token in tokenizer.get_vocab(with_added_tokens=True).items()
        if token not in special
    }


def _token_bytes(text: str, alphabet: Mapping[str, int]) -> bytes:
    # A token with one character outside the alphabet stands for its own UTF-8 text as a whole.
    try:
        return bytes([alphabet[char] for char in text])
    except KeyError:
        return text.encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of the 256 bytes in byte-level BPE (GPT-2): printable Latin-1 stands for itself."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}
