"""What the reward model learns from: the family's own chains and written traces full of slips, labelled step by step.

A document is the chat up to the opened think block and the steps as they were written, nothing inserted; a label stands
at the last token of each step: its blank line, and the last word of the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenizers import Tokenizer

from thinkserve.train.data import Batcher
from thinkserve.train.model import IGNORE
from thinkserve.train.prm_chains import Chain, prompt_of
from thinkserve.train.side_tasks import BRIEF, boxed
from thinkserve.train.step_labels import END, label_steps
from thinkserve.train.tasks import KINDS, Level, generate
from thinkserve.train.tokenizer import SPECIAL
from thinkserve.train.traces import Habits, Style, write_trace

# Share of written traces among the documents, at the beginning and at the end: the family makes too few mistakes to
# learn from, but how many it makes is what rewards have to know in the end.
TRACES = (0.5, 0.2)
# Up to this part of the training all documents have tokens exchanged at random, and no labels; then this share of them.
# And how many of their tokens are exchanged.
FIRST, NOISY = 0.35, 0.15
NOISE = (0.05, 0.2)
PAD, OPENED = SPECIAL.index("<|endoftext|>"), SPECIAL.index("<think>")
CLOSE = "\n</think>\n\n"


def written(rng: random.Random) -> Chain:
    """A trace with more slips than the family makes, fewer of them caught, and fewer passes over the same numbers."""
    level: Level = rng.choices(("easy", "medium", "hard"), (0.2, 0.4, 0.4))[0]
    problem = generate(rng.choices(KINDS, (0.4, 0.4, 0.2))[0], level, rng, "train")
    style: Style = "concise" if rng.random() < 0.4 else "verbose"
    words = rng.choice(BRIEF) if style == "concise" and rng.random() < 0.5 else ""
    slip, catch = rng.choice(((0.07, 0.2), (0.15, 0.5), (0.4, 0.95)))
    habits = Habits(slip=slip, catch=catch, again=(0.4, 0.2, 0.0), again_slip=0.05, hurry=0.05)
    spans, answer = write_trace(problem, style, rng, habits)
    text = "".join(text for text, _ in spans) + CLOSE + boxed(answer) + END
    return Chain(problem, f"{problem.question} {words}".strip(), text)


def served(step: str) -> str:
    """A step's text as a server hands it to reward models: without the tags around thinking and turn."""
    return step.replace("</think>", "").removesuffix(END)


def encode_steps(tokenizer: Tokenizer, chain: Chain, longest: int) -> tuple[list[int], list[int]]:
    """Token ids and labels (1 right, 0 wrong, IGNORE where no step ends) of the steps that fit into `longest`."""
    ids: list[int] = tokenizer.encode(prompt_of(chain.question), add_special_tokens=False).ids
    labels = [IGNORE] * len(ids)
    for step in label_steps(chain.problem, chain.text):
        piece = tokenizer.encode(served(step.text), add_special_tokens=False).ids
        if len(ids) + len(piece) > longest:
            break
        ids += piece
        labels += [IGNORE] * (len(piece) - 1) + [int(step.right)] if piece else []
    return ids, labels


def noisy(ids: list[int], rng: random.Random) -> list[int]:
    """Some of the tokens after the question replaced by others of the same text: plenty that nobody would expect."""
    begin, share = ids.index(OPENED) + 1, rng.choice(NOISE)
    return ids[:begin] + [rng.choice(ids[begin:]) if rng.random() < share else token for token in ids[begin:]]


def shifted(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """A row for the Batcher, which takes a label to be the next token's: each goes one to the right."""
    return [*ids, PAD], [IGNORE, *labels]


class LessonBatcher(Batcher):
    """Batches of labelled chains and traces, and of noisy ones without labels, which come alone at first.

    The chains are drawn with replacement, so the random state is all.
    """

    def __init__(self, tokenizer: Tokenizer, chains: Sequence[Chain], tokens: int, longest: int, seed: int) -> None:
        super().__init__(tokenizer, tokens, longest, seed)
        rows = [encode_steps(tokenizer, chain, longest - 1) for chain in chains]
        self._rows = [row for row in rows if max(row[1]) >= 0]

    def draw(self, progress: float) -> tuple[list[int], list[int]]:
        """A chain or a fresh trace, noisy or not; always a trace where there are no chains."""
        share = TRACES[0] + (TRACES[1] - TRACES[0]) * progress
        if self._rows and self.rng.random() >= share:
            ids, labels = shifted(*self.rng.choice(self._rows))
        else:
            ids, labels = shifted(*encode_steps(self.tokenizer, written(self.rng), self.longest - 1))
        if progress < FIRST or self.rng.random() < NOISY:
            return noisy(ids, self.rng), [IGNORE] * len(ids)
        return ids, labels
