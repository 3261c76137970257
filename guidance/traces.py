"""Thinking traces of a model's own, for the predictor to learn from: read from a file, or written by the model in vLLM.

A file holds JSON lines: `{"messages": [...], "completion": "..."}`, or `"prompt"` in place of `"messages"`; prompt and
completion are text or token ids, and a completion begins where the prompt leaves off. A line without completion is
written by the model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkserve.train.evaluate import Sampler
from thinkserve.train.side_tasks import BRIEF
from thinkserve.train.tasks import KINDS, Level, generate

# Shares of the family's problems in its predictor's diet, and of questions that ask for brevity.
LEVELS: dict[Level, float] = {"easy": 0.2, "medium": 0.6, "hard": 0.2}
BRIEF_SHARE = 0.15

Ids = tuple[int, ...]


class BadTraces(ValueError):
    """Traces that cannot be used; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Token ids of a prompt, up to where thinking begins, and of what the model wrote; None: it has yet to write."""

    prompt: Ids
    completion: Ids | None = None


class Words:
    """A model's tokenizer, as far as traces need it. Raises BadTraces when a tag is not one token."""

    def __init__(self, folder: Path, close: str = "</think>") -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        found = self.ids(close)
        if len(found) != 1:
            raise BadTraces(f"budget guidance needs the end of thinking to be one token; {close!r} is {len(found)}")
        self.close = found[0]

    def ids(self, text: str) -> Ids:
        """Token ids of text; special tokens in it count, none are added."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, messages: Sequence[dict[str, str]]) -> Ids:
        """The chat, rendered up to where the model takes over."""
        return self.ids(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def newlines(self, vocabulary: int) -> Ids:
        """All tokens below `vocabulary` whose text holds a line break."""
        known = min(vocabulary, len(self._tokenizer))
        texts = self._tokenizer.batch_decode([[token] for token in range(known)])
        return tuple(token for token, text in enumerate(texts) if "\n" in text)


def read(file: Path, words: Words) -> list[Trace]:
    """The traces of a file. Raises BadTraces with the number of a line that cannot be used, OSError."""
    traces = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                traces.append(_trace(json.loads(line), words))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise BadTraces(f"{file}:{number}: {error}") from error
    if not traces:
        raise BadTraces(f"no traces in {file}")
    return traces


def _trace(entry: dict[str, Any], words: Words) -> Trace:
    given, completion = entry.get("prompt"), entry.get("completion")
    if given is None:
        if not isinstance(entry.get("messages"), list):
            raise ValueError("a trace needs a prompt or messages")
        prompt = words.prompt(entry["messages"])
    else:
        prompt = _ids(given, words)
    return Trace(prompt, None if completion is None else _ids(completion, words))


def _ids(given: Any, words: Words) -> Ids:
    if isinstance(given, str):
        return words.ids(given)
    if not isinstance(given, list) or not all(type(token) is int for token in given):
        raise ValueError("prompt and completion are text or lists of token ids")
    return tuple(given)


def write(file: Path, traces: Iterable[Trace]) -> None:
    """A file that `read` understands."""
    lines = (json.dumps({"prompt": trace.prompt, "completion": trace.completion}) for trace in traces)
    part = file.with_suffix(".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(file)


def tasks(count: int, words: Words, seed: int) -> list[Trace]:
    """Prompts of `count` problems of the embedded family (split "train"), some of them asking for brevity."""
    return [Trace(words.prompt([{"role": "user", "content": question}])) for question in _questions(count, seed)]


def _questions(count: int, seed: int) -> Iterator[str]:
    rng = random.Random(f"budget/{seed}")
    for index in range(count):
        level = rng.choices(list(LEVELS), list(LEVELS.values()))[0]
        problem = generate(KINDS[index % len(KINDS)], level, rng, "train")
        words = rng.choice(BRIEF) if rng.random() < BRIEF_SHARE else ""
        yield f"{problem.question} {words}".strip()


def completed(traces: list[Trace], sampler: Sampler, *, temperature: float, most: int, seed: int) -> list[Trace]:
    """The traces, each that has no completion written by the sampler's model: at most `most` tokens."""
    waiting = [list(trace.prompt) for trace in traces if trace.completion is None]
    written = iter(sampler(waiting, temperature=temperature, seed=seed, most=most) if waiting else [])
    return [Trace(t.prompt, tuple(next(written))) if t.completion is None else t for t in traces]
