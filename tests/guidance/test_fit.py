"""What the predictor learns from: the positions, the lengths, the states; and a training that can be interrupted."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from transformers import AutoModel

from thinkserve.guidance.checkpoint import BadPredictor, load, read_about
from thinkserve.guidance.fit import Fit, Recipe, positions
from thinkserve.guidance.run import Source, train
from thinkserve.guidance.traces import BadTraces, Trace, Words, completed, read, tasks, write
from thinkserve.steering.fingerprint import fingerprint
from thinkserve.train.evaluate import Sampler

CLOSE, NEWLINE = 4, 10
RECIPE = Recipe(epochs=2, batch=32, held_out=0.2)


def some_traces(n: int = 12) -> list[Trace]:
    """Random tokens, three lines of thinking, an answer."""
    rng = random.Random(0)

    def line() -> tuple[int, ...]:
        return (*(rng.randrange(20, 600) for _ in range(rng.randint(2, 6))), NEWLINE)

    return [Trace((1, 50 + i, 3), line() + line() + line() + (CLOSE, 77, 2)) for i in range(n)]


def test_the_position_that_predicts_the_closing_tag_has_one_token_left() -> None:
    """And each one before it has one more; a line begins at the first token and after each line break."""
    trace = Trace((1, 2, 3), (30, 31, NEWLINE, 32, CLOSE, 33))

    found = [(p.at, p.token, p.left, p.line_start) for p in positions(trace, CLOSE, frozenset({NEWLINE}))]

    assert [
        (2, 30, 5, True), (3, 31, 4, False), (4, NEWLINE, 3, False), (5, 32, 2, True), (6, CLOSE, 1, False),
    ] == found  # fmt: skip


def test_thinking_without_an_end_teaches_nothing() -> None:
    """How long it would have gone on is not known."""
    assert [] == positions(Trace((1,), (30, 31)), CLOSE, frozenset())


def test_states_are_those_that_hugging_face_reports(folder: Path) -> None:
    """Embedding, block outputs, the last one after the final norm, at the very position; padding does not matter."""
    fit = Fit(folder, some_traces(), RECIPE, CLOSE, (NEWLINE,))
    chosen = sorted(fit.held_out, key=lambda pair: len(pair[0].completion or ()))
    data = fit.data(chosen)
    trace, places = chosen[0]
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        out = model(torch.tensor([trace.prompt + (trace.completion or ())]), output_hidden_states=True)
    expected = torch.stack([hidden[0, places[1].at] for hidden in out.hidden_states])

    torch.testing.assert_close(data.states[1], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(expected[-1], out.last_hidden_state[0, places[1].at])
    assert (3, 64) == expected.shape
    assert places[1].token == data.token[1]
    assert float(data.x[1]) == pytest.approx(math.log(places[1].left + 1))


def test_every_line_start_is_learned_from_and_of_the_others_a_sample(folder: Path) -> None:
    """Held-out traces are asked at line starts only, as in serving."""
    fit = Fit(folder, some_traces(), RECIPE, CLOSE, (NEWLINE,))
    every = [p for trace, _ in fit.traces for p in positions(trace, CLOSE, frozenset({NEWLINE}))]
    starts = sum(p.line_start for p in every)
    used = [p for _, places in fit.traces for p in places]

    assert starts == sum(p.line_start for p in used) < len(used) < len(every)
    assert all(p.line_start for _, places in fit.held_out for p in places)


def test_a_prompt_that_leaves_nothing_to_learn_is_left_out(folder: Path) -> None:
    """Longer than what is learned from, or none at all; the rest is as good as without it."""
    recipe = Recipe(epochs=1, batch=32, held_out=0.5, longest=10)
    others = [Trace((1,) * 11, (NEWLINE, CLOSE)), Trace((), (NEWLINE, CLOSE))] * 6

    fit = Fit(folder, [*some_traces(), *others], recipe, CLOSE, (NEWLINE,))

    assert 12 == len([*fit.traces, *fit.held_out])
    assert fit.check()["positions"] >= 6
    assert fit.steps == len(list(fit.train()))
    with pytest.raises(BadTraces, match="0 of 12 traces have a prompt of 1 to 10 tokens and end their thinking"):
        Fit(folder, others, recipe, CLOSE, (NEWLINE,))


def test_what_is_held_out_has_not_been_learned_from(folder: Path) -> None:
    """Several traces of one prompt stand on one side; of a single prompt nothing could be held out."""
    several = [replace(trace, prompt=(1, 50 + index // 4, 3)) for index, trace in enumerate(some_traces())]

    fit = Fit(folder, several, RECIPE, CLOSE, (NEWLINE,))

    held, learned = ({trace.prompt for trace, _ in side} for side in (fit.held_out, fit.traces))
    assert (1, 2, set()) == (len(held), len(learned), held & learned)
    assert (4, 8) == (len(fit.held_out), len(fit.traces))
    with pytest.raises(BadTraces, match="two prompts"):
        Fit(folder, several[:4], RECIPE, CLOSE, (NEWLINE,))


def test_long_traces_go_through_the_model_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their states would not fit in memory together; what is found is the same."""
    fit = Fit(folder, some_traces(), RECIPE, CLOSE, (NEWLINE,))
    together, passes = fit.data(fit.traces), list(fit._passes(fit.traces))
    monkeypatch.setattr("thinkserve.guidance.fit.PASS_BYTES", 4 * 3 * 64 * 30)

    apart = list(fit._passes(fit.traces))

    assert len(passes) < len(apart) <= len(fit.traces)
    assert fit.traces == [pair for few in apart for pair in few]
    torch.testing.assert_close(fit.data(fit.traces).states, together.states, atol=1e-5, rtol=1e-4)


def test_pools_of_states_bound_the_memory_and_cover_every_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model's states do not fit at once."""
    monkeypatch.setattr("thinkserve.guidance.fit.POOL_BYTES", 4 * 3 * 64 * 10)
    fit = Fit(folder, some_traces(), RECIPE, CLOSE, (NEWLINE,))

    assert fit.traces == [pair for pool in fit._pools for pair in pool]
    assert all(sum(len(places) for _, places in pool) <= 10 or len(pool) == 1 for pool in fit._pools)
    assert fit.steps == len(list(fit.train())) > len(fit._pools) > 1


def test_training_lowers_the_loss_and_an_interrupted_one_goes_on_as_if_it_had_not_been(folder: Path) -> None:
    """Same losses, same weights."""
    whole = Fit(folder, some_traces(), RECIPE, CLOSE, (NEWLINE,))
    losses = list(whole.train())
    first = Fit(folder, some_traces(), RECIPE, CLOSE, (NEWLINE,))
    begun = [loss for _, loss in zip(range(3), first.train(), strict=False)]
    second = Fit(folder, some_traces(), RECIPE, CLOSE, (NEWLINE,))
    second.restore(first.state())

    assert losses == begun + list(second.train())
    assert losses[-1] < losses[0]
    for name, tensor in whole.predictor.state_dict().items():
        torch.testing.assert_close(second.predictor.state_dict()[name], tensor, msg=name)


def test_another_recipe_does_not_go_on(folder: Path) -> None:
    """It would be neither the one nor the other."""
    fit = Fit(folder, some_traces(), RECIPE, CLOSE, (NEWLINE,))
    other = Fit(folder, some_traces(), Recipe(epochs=3, batch=32, held_out=0.2), CLOSE, (NEWLINE,))

    with pytest.raises(BadTraces, match="other settings"):
        other.restore(fit.state())


def nobody(context: int) -> NoReturn:
    """Nothing is to be written."""
    raise AssertionError("the model was started")


def test_the_command_leaves_a_predictor_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    """From a file of traces, in text and in ids; what was written can be loaded and says what it is."""
    lines = [
        {"messages": [{"role": "user", "content": "1+1?"}], "completion": "Two.\n\nYes.\n</think>\n\n2<|im_end|>"}
    ] * 6
    file = tmp_path / "traces.jsonl"
    ids = {"prompt": [1, 2, 3], "completion": [40, CLOSE, 41]}
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, ids]))
    said: list[str] = []

    training = train(folder, tmp_path / "budget", Source(file), Recipe(epochs=3, batch=1000), said.append, nobody)

    predictor, about = load(tmp_path / "budget")
    assert {"predictor.json", "predictor.safetensors"} == {f.name for f in (tmp_path / "budget").iterdir()}
    assert (CLOSE, fingerprint(folder), 640) == (about.close, about.model, about.size.vocabulary)
    assert training["steps"] == 3
    assert set(about.newlines) == set(Words(folder).newlines(640))
    assert predictor(torch.zeros(1, 3, 64))[0].shape == (1, 640)


def test_what_was_left_of_other_traces_is_not_taken_up(folder: Path, tmp_path: Path) -> None:
    """Not even by the second of two calls, the first of which failed; nor is a training on other traces continued."""
    asked: list[int] = []
    contexts: list[int] = []

    def sampler(prompts: list[list[int]], *, temperature: float, seed: int, most: int = 0) -> list[list[int]]:
        asked.append(len(prompts))
        if len(asked) == 1:
            raise OSError("no memory")
        return [[40, CLOSE]] * len(prompts)

    @contextmanager
    def writing(context: int) -> Iterator[Sampler]:
        contexts.append(context)
        yield sampler

    write(tmp_path / "traces.jsonl", [Trace((9,), (40, CLOSE))] * 5)
    (tmp_path / "traces.jsonl.json").write_text('{"model": "another"}')
    source, recipe = Source(tasks=3), Recipe(epochs=1)

    with pytest.raises(OSError, match="no memory"):
        train(folder, tmp_path, source, recipe, print, writing)
    train(folder, tmp_path, source, recipe, print, writing)

    longest = max(len(trace.prompt) for trace in tasks(3, Words(folder), recipe.seed))
    assert ([3, 3], [longest + source.most] * 2) == (asked, contexts)
    (tmp_path / "last.pt").touch()
    (tmp_path / "traces.jsonl.json").write_text('{"model": "another"}')
    with pytest.raises(BadTraces, match="unfinished training on other traces"):
        train(folder, tmp_path, source, recipe, print, writing)


def test_a_damaged_or_missing_predictor_is_told_in_a_line(tmp_path: Path) -> None:
    """With its file's name."""
    with pytest.raises(BadPredictor, match="no budget predictor"):
        read_about(tmp_path)
    (tmp_path / "predictor.json").write_text("{}")
    with pytest.raises(BadPredictor, match=r"predictor\.json"):
        load(tmp_path)


@pytest.mark.parametrize("line", ['{"prompt": 3}', '{"completion": "x"}', "[]", '{"prompt": ["a"]}', "{"])
def test_a_line_that_is_no_trace_is_named(folder: Path, tmp_path: Path, line: str) -> None:
    """File and line number."""
    file = tmp_path / "t.jsonl"
    file.write_text(f"\n{line}\n")

    with pytest.raises(BadTraces, match=r"t\.jsonl:2:"):
        read(file, Words(folder))


def test_tasks_are_prompts_that_open_the_think_block(folder: Path) -> None:
    """The same for the same seed; some of them ask for brevity."""
    words = Words(folder)
    found = tasks(40, words, seed=1)

    assert found == tasks(40, words, seed=1) != tasks(40, words, seed=2)
    assert all(trace.prompt[-2:] == words.ids("<think>\n") for trace in found)
    assert len({trace.prompt for trace in found}) == 40


def test_a_tag_of_several_tokens_is_refused(folder: Path) -> None:
    """The engine looks for one."""
    with pytest.raises(BadTraces, match="one token"):
        Words(folder, "</thought>")


def test_what_lacks_a_completion_is_written_by_the_model(folder: Path) -> None:
    """In one call, in order; the others stay as they are."""
    given = [Trace((1, 2), (9,)), Trace((3,)), Trace((4,), ()), Trace((5,))]
    asked: list[list[list[int]]] = []

    def sampler(prompts: list[list[int]], *, temperature: float, seed: int, most: int = 0) -> list[list[int]]:
        asked.append(prompts)
        return [[*prompt, round(temperature), seed, most] for prompt in prompts]

    found = completed(given, sampler, temperature=1.0, most=7, seed=5)

    assert [[[3], [5]]] == asked
    assert [(9,), (3, 1, 5, 7), (), (5, 1, 5, 7)] == [trace.completion for trace in found]


def test_written_traces_are_read_again(folder: Path, tmp_path: Path) -> None:
    """Also those that are still to be written."""
    traces = [Trace((1, 2), (9,)), Trace((3,))]

    write(tmp_path / "t.jsonl", traces)

    assert traces == read(tmp_path / "t.jsonl", Words(folder))
