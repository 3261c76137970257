"""The training batches: whole documents, masked as the documents say, resumable at the very next batch."""

from __future__ import annotations

import random
import re
from copy import deepcopy
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from thinkserve.train.data import Batcher, Curriculum, draw_document, encode, spans_of
from thinkserve.train.model import IGNORE
from thinkserve.train.practice import RECALL, SUMS
from thinkserve.train.side_tasks import Document
from thinkserve.train.tasks import split_of

MODELS = Path(__file__).resolve().parents[2] / "models"
TOKENIZER = Tokenizer.from_file(str(MODELS / "arith-small" / "tokenizer.json"))
TAGS = [TOKENIZER.token_to_id(tag) for tag in ("<think>", "</think>")]
seeds = st.integers(0, 2**32)


@given(seeds, st.floats(0, 1))
def test_labels_are_the_tokens_that_carry_loss(seed: int, progress: float) -> None:
    """The ids spell the whole document, the labels its learned spans, and the end of the turn is learned."""
    document = draw_document(random.Random(seed), progress, Curriculum())
    ids, labels = encode(TOKENIZER, document)
    spans = list(spans_of(document))
    assert "".join(text for text, _ in spans) == TOKENIZER.decode(ids, skip_special_tokens=False)
    kept = [label for label in labels if label != IGNORE]
    assert "".join(text for text, learn in spans if learn) == TOKENIZER.decode(kept, skip_special_tokens=False)
    assert all(label in {IGNORE, token} for token, label in zip(ids, labels, strict=True))
    assert TOKENIZER.token_to_id("<|im_end|>") == kept[-1]


@given(seeds)
def test_the_prompt_carries_no_loss(seed: int) -> None:
    """Nothing up to the opened think block is learned, the system message included."""
    document = draw_document(random.Random(seed), 1.0, Curriculum())
    ids, labels = encode(TOKENIZER, document)
    opened = ids.index(TOKENIZER.encode("<think>").ids[0])
    assert {IGNORE} == set(labels[: opened + 1])


def test_a_document_reads_as_the_chat_template_writes_it() -> None:
    """System, user, thinking and answer, in the template's form."""
    document = Document("Q", (("T", True),), "A", system="S")
    assert (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n"
        "T\n</think>\n\nA<|im_end|>\n"
    ) == "".join(text for text, _ in spans_of(document))


def rows_of(batcher: Batcher, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches = [batcher.batch(0.5) for _ in range(count)]
    return [(ids, labels) for inputs, targets in batches for ids, labels in zip(inputs, targets, strict=True)]


def test_every_row_is_one_document_from_its_beginning() -> None:
    """No document sees another; labels are the next token or nothing, and padding is never learned."""
    start = TOKENIZER.encode("<|im_start|>").ids[0]
    for ids, labels in rows_of(Batcher(TOKENIZER, 1024, 512, seed=3), 12):
        assert start == int(ids[0])
        known = labels[:-1] != IGNORE
        assert torch.equal(ids[1:][known], labels[:-1][known])
        assert 2 == sum(token in TAGS for token in ids.tolist())


def test_batches_are_of_like_size_and_hold_little_padding() -> None:
    """At most the tokens asked for, unless one document alone is longer; most of what is computed is text."""
    batcher = Batcher(TOKENIZER, 2048, 1024, seed=4)
    batches = [batcher.batch(0.5)[0] for _ in range(40)]
    assert all(ids.numel() <= 2048 or len(ids) == 1 for ids in batches)
    padding = sum(int((ids == 0).sum()) for ids in batches) / sum(ids.numel() for ids in batches)
    assert padding < 0.15


def test_documents_beyond_the_longest_are_left_out() -> None:
    """They would cost most and teach least."""
    assert all(len(ids) < 100 for ids, _ in rows_of(Batcher(TOKENIZER, 512, 100, seed=5), 30))


@settings(max_examples=5)
@given(seeds)
def test_a_restored_batcher_goes_on_with_the_next_batch(seed: int) -> None:
    """The state holds everything: what follows is equal, beyond the pool too."""
    batcher = Batcher(TOKENIZER, 256, 512, seed)
    batcher.batch(0.1)
    copy = Batcher(TOKENIZER, 256, 512, seed=0)
    copy.restore(deepcopy(batcher.state()))
    for _ in range(40):
        for ours, theirs in zip(batcher.batch(0.2), copy.batch(0.2), strict=True):
            assert torch.equal(ours, theirs)


def test_the_curriculum_moves_from_easy_to_medium() -> None:
    """No hard problem in the beginning, mostly medium ones in the end."""
    curriculum, rng = Curriculum(), random.Random(0)
    first = [curriculum.draw(0.0, rng) for _ in range(500)]
    last = [curriculum.draw(1.0, rng) for _ in range(500)]
    assert "hard" not in first
    assert first.count("easy") > 300
    assert last.count("medium") > 250
    assert last.count("hard") > 30


QUESTION = re.compile(r"Start with .*? What is the result\?|Compute \S+\.|\w+ has the .*? have\?")


def test_training_documents_ask_training_questions() -> None:
    """Whatever the task around it, the question of a document belongs to the training split.

    Bare sums and look-ups without a swap are nothing that the evaluation can ask.
    """
    rng = random.Random(5)
    for _ in range(300):
        user = draw_document(rng, 1.0, Curriculum()).user
        if user in {RECALL, SUMS} or (" has the " in user and " swap" not in user):
            continue
        asked = QUESTION.findall(user)
        assert 1 == len(asked), user
        assert "train" == split_of(asked[0])
