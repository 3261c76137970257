"""Benches that run the server in this process: rows are requests, samples are responses, targets are judged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import pytest

from bench import brevity, search, speculative, trimr
from bench.harness import Journal
from bench.inprocess import NAME, Asked, Measured, Refused, Row, Run, Sample, measure
from bench.tasks import load
from thinkserve.server.app import create_app
from thinkserve.server.settings import Settings
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies.testing import ScriptedEngine

pytestmark = pytest.mark.anyio


def measured(
    name: str, right: Sequence[bool], total: int = 100, usage: Mapping[str, object] = {}, answers: str = ""
) -> Measured:
    """A row with one sample for each of `right`; `answers` are the characters that they answered."""
    said = answers or "7" * len(right)
    samples = [
        Sample(each, f"\\boxed{{{answer}}}", total, total, 1.0, usage) for each, answer in zip(right, said, strict=True)
    ]
    return Measured(Row(name), samples)


async def test_a_row_is_what_a_client_would_send(tmp_path: Path) -> None:
    """Its words follow the question, its body the sampling; what the response says becomes the sample."""
    problems = load("easy", 3, seed=0)
    engine = ScriptedEngine([f"thinking</think>\\boxed{{{problems[0].answer}}}"])
    app = create_app(Settings(served_name=NAME), ScriptedBackend(engine))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        journal = Journal(tmp_path / "journal.jsonl")
        row = Row("two", {"strategy": {"name": "majority", "params": {"k": 2}}}, words="Be brief.")
        done = await measure(client, row, problems, Asked(concurrency=1), journal)
        again = await measure(client, row, problems, Asked(concurrency=1), Journal(tmp_path / "journal.jsonl"))

    prompts = [engine.decode(stream.job.prompt) for stream in engine.history]
    assert prompts[0].startswith(f"user: {problems[0].question} Be brief.")
    assert 6 == len(engine.history)
    assert done.samples[0].right
    assert sum(stream.generated for stream in engine.history[:2]) == done.samples[0].total
    assert done.samples == again.samples


async def test_a_refused_row_ends_the_bench_with_the_servers_words(tmp_path: Path) -> None:
    """No table is made of what was not measured."""
    app = create_app(Settings(served_name=NAME), ScriptedBackend(ScriptedEngine([""])))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        row = Row("none", {"strategy": {"name": "a-star"}})
        with pytest.raises(ExceptionGroup) as caught:
            await measure(client, row, load("easy", 1, 0), Asked(1), Journal(tmp_path / "journal.jsonl"))
    assert caught.group_contains(Refused, match="none: .*reward")


def test_a_run_is_kept_as_text_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line printed is the JSON; nothing is written without a folder."""
    run = Run("name", "models/arith-small", {"problems": 2})
    run.publish([(("a", "b"), [["1", "2"]])], "<svg/>", tmp_path)

    assert {"json", "md", "svg"} == {file.suffix[1:] for file in tmp_path.iterdir()}
    assert [[{"a": "1", "b": "2"}]] == json.loads(capsys.readouterr().out.splitlines()[-1])["tables"]


def test_other_weights_of_any_model_are_another_run(tmp_path: Path) -> None:
    """Samples of a reward model that was trained anew do not pass for those of the old one."""
    (tmp_path / "model.safetensors").write_bytes(b"old")
    run = Run("name", "models/arith-small", {"problems": 2}, (str(tmp_path),))
    before = run.journal().path
    (tmp_path / "model.safetensors").write_bytes(b"newer")

    assert before != run.journal().path == run.journal().path


def test_a_star_is_judged_where_it_first_is_as_accurate_as_best_of_8() -> None:
    """Its cheapest such row counts; without one, the cheapest of all, and that is a miss."""
    best = measured("best-of-n@8", [True, True, False], 900, {"prm_passes": 8})
    cheap = measured("a-star@4", [True, False, False], 200, {"prm_passes": 3})
    good = measured("a-star@8", [True, True, False], 300, {"prm_passes": 9})

    accuracy, tokens, passes = search.verdicts([best, cheap, good], "a-star")
    assert ("met", "met", "missed") == (accuracy[3], tokens[3], passes[3])
    assert "missed" == search.verdicts([best, cheap], "a-star")[0][3]
    assert [] == search.verdicts([good], "a-star")
    assert [] == search.verdicts([best, good], "a-star-ahead")


def test_searches_are_compared_with_best_of_8_problem_by_problem() -> None:
    """One answer of three less, at a third of the tokens; best-of-8 itself is not in the table, nor one without it."""
    best = measured("best-of-n@8", [True, True, False], 900, {"prm_passes": 8, "prm_tokens": 1000})
    cheap = measured("a-star@4", [True, False, False], 300, {"prm_passes": 16, "prm_tokens": 250})

    (line,) = search.against([best, cheap])
    assert ["a-star@4", "-0.333", "0.33", "2.00", "0.25"] == [line[0], *(cell.split(" ")[0] for cell in line[1:])]
    assert len(search.AGAINST) == len(line)
    assert [] == search.against([cheap])


def test_both_models_are_judged_by_what_they_recover() -> None:
    """0.25 to 0.75 is the difference; 0.5 is half of it."""
    usage = {"winner_completion_tokens": 100, "draft_tokens": 20}
    small = measured("small", [True, False, False, False], 100, usage)
    large = measured("large", [True, True, True, False], 100, usage)
    both = measured("both", [True, True, False, False], 100, usage)
    cued = measured("both", [True, True, False, False], 100, {**usage, "injected_tokens": 10})

    recovered, guide, length = speculative.verdicts(small, large, both)
    assert ("0.50", "met") == (recovered[2], recovered[3])
    assert ("0.20", "met", "met") == (guide[2], guide[3], length[3])
    longer = speculative.verdicts(small, large, cued)[2]
    assert ("missed", True) == (longer[3], longer[2].startswith("1.10"))


def test_changed_and_spoilt_compare_with_the_same_seed() -> None:
    """Another answer is changed; one that was right before is spoilt."""
    free = measured("untrimmed/1", [True, True, False], answers="123")
    trimmed = measured("all rules/1", [True, False, False], answers="145")

    assert pytest.approx([2 / 3, 1 / 3]) == list(trimr.changed(trimmed, free))


def test_one_rule_alone_is_the_only_one_that_is_on() -> None:
    """All are named, so that a default cannot add one."""
    row = trimr.row_of("repetition", ["repetition"], 32)
    assert {"overthinking": False, "underthinking": False, "repetition": True} == row.body["strategy"]["params"]


def test_the_shortest_vector_that_costs_no_accuracy_is_judged() -> None:
    """A shorter one that costs more does not count, unless there is no other."""
    free = measured("unsteered", [True] * 4, 100)
    harmless, harmful = measured("vector a", [True] * 4, 60), measured("vector b", [False] * 4, 20)

    assert brevity.verdicts([free, harmless, harmful])[0][0].startswith("vector a")
    assert "missed" == brevity.verdicts([free, harmful])[1][3]
    assert [] == brevity.verdicts([free])


def test_a_vector_acts_at_the_strength_that_calibration_chose() -> None:
    """As its card says; raw when it was never calibrated."""
    calibrated, raw = ({"id": "a", "about": about} for about in ({"calibration": {"scale": 0.75}}, {}))

    assert {"vector": "a", "scale": 0.75} == brevity.steered(calibrated).body["strategy"]["params"]
    assert {"vector": "a", "scale": 1.0} == brevity.steered(raw).body["strategy"]["params"]
