"""Which predictor a server takes, and what the operator is told: by the server's start and by `thinkserve budget`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from thinkserve.guidance.checkpoint import About, save
from thinkserve.guidance.predictor import Predictor, Size
from thinkserve.server import cli, vectors_writer, vllm_launch
from thinkserve.server.model_dir import StartError, check_model
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_guidance import find_predictor
from thinkserve.steering.fingerprint import fingerprint
from thinkserve.steering.writer import Written

SIZE = Size.of(hidden=64, blocks=2, vocabulary=640)


@pytest.fixture(autouse=True)
def _no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have named a predictor; and other tests want a torch that compiles."""
    monkeypatch.delenv("THINKSERVE_BUDGET_PREDICTOR", raising=False)
    monkeypatch.setattr(vllm_launch, "prepare_environment", lambda *_: None)


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """A model of one's own to put a predictor into."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def put(folder: Path, model: str, size: Size = SIZE) -> None:
    """A predictor of random weights."""
    save(folder, Predictor(size), About(size, 4, (10,), model, 2.5, {"steps": 3, "held_out_check": {"nats": 1.5}}))


def test_a_model_without_predictor_is_served_without_guidance(model: Path) -> None:
    """None is not an error, nor is a training that has not come to its end."""
    assert None is find_predictor(Settings(), check_model(model))

    (model / "budget").mkdir()
    (model / "budget" / "traces.jsonl").write_text("{}")

    assert None is find_predictor(Settings(), check_model(model))


def test_the_predictor_in_the_models_folder_is_found(model: Path) -> None:
    """By itself."""
    put(model / "budget", fingerprint(model))

    assert (model / "budget").resolve() == find_predictor(Settings(), check_model(model))


def test_a_predictor_of_other_weights_is_refused_unless_the_operator_names_it(model: Path, tmp_path: Path) -> None:
    """A retrained model has the same sizes; a predictor may be meant for a model's relative."""
    put(model / "budget", "other weights")
    put(tmp_path / "elsewhere", "other weights")
    named = Settings(budget_predictor=tmp_path / "elsewhere")

    with pytest.raises(StartError, match="budget train"):
        find_predictor(Settings(), check_model(model))
    assert (tmp_path / "elsewhere").resolve() == find_predictor(named, check_model(model))


@pytest.mark.parametrize("changed", [{"hidden": 32}, {"states": 4}, {"vocabulary": 641}])
def test_a_predictor_of_other_sizes_is_refused_always(model: Path, tmp_path: Path, changed: dict[str, int]) -> None:
    """It could not be computed."""
    put(tmp_path / "elsewhere", fingerprint(model), replace(SIZE, **changed))

    with pytest.raises(StartError, match="another model"):
        find_predictor(Settings(budget_predictor=tmp_path / "elsewhere"), check_model(model))


def test_an_operator_may_go_without_guidance(model: Path) -> None:
    """Also with a predictor that no longer fits."""
    put(model / "budget", "other weights")

    assert None is find_predictor(Settings(guidance=False), check_model(model))


def test_a_folder_that_holds_none_is_told(model: Path, tmp_path: Path) -> None:
    """The operator named it."""
    with pytest.raises(StartError, match="no budget predictor in"):
        find_predictor(Settings(budget_predictor=tmp_path), check_model(model))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of `thinkserve budget ...`."""
    monkeypatch.setattr(sys, "argv", ["thinkserve", "budget", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "MODEL"], "needs --traces FILE or --tasks N"),
        (["train", "MODEL", "--tasks", "3", "--traces", "x"], "needs --traces FILE or --tasks N"),
        (["train", "MODEL", "--traces", "no-such-file"], "No such file: no-such-file"),
        (["train", "no-such-model/", "--tasks", "3"], "Model directory not found: no-such-model"),
        (["train", "MODEL", "--tasks", "x"], "--tasks"),
        (["show", "MODEL"], "no budget predictor in"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """Nothing on standard output."""
    status = command(monkeypatch, *(str(model) if word == "MODEL" else word for word in arguments))

    out, err = capsys.readouterr()
    assert (2, "", 1) == (status, out, len(err.splitlines()))
    assert told in err


def test_traces_that_cannot_be_used_are_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the file's name and the line."""
    (tmp_path / "t.jsonl").write_text("nothing\n")

    status = command(monkeypatch, "train", str(model), "--traces", str(tmp_path / "t.jsonl"))

    assert 2 == status
    assert "t.jsonl:1:" in capsys.readouterr().err.splitlines()[-1]


def test_show_tells_what_is_known(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it fits, how large it is, how well it did."""
    put(model / "budget", fingerprint(model))

    status = command(monkeypatch, "show", str(model))

    out = capsys.readouterr().out
    assert 0 == status
    assert "made for these weights" in out
    assert "2 layers of width 64 over 3 states of 64" in out
    assert "held out check nats" in out


@pytest.mark.parametrize(("longest", "context"), [(100, 110), (4000, 512)])
def test_the_engine_that_serves_writes_the_traces_in_no_more_context_than_they_need(
    model: Path, monkeypatch: pytest.MonkeyPatch, longest: int, context: int
) -> None:
    """A large model's whole context may not fit into memory; an old predictor is not in the way of a new one."""
    put(model / "budget", "other weights")
    started: list[Settings] = []

    class Writer:
        """Closes its thinking at once."""

        def write(self, prompts: Sequence[list[int]], *, temperature: float, seed: int, most: int) -> list[Written]:
            return [Written([41, 42, 4, 43, 2], [41, 42], closed=True) for _ in prompts]

    @contextmanager
    def start(settings: Settings) -> Iterator[Writer]:
        started.append(settings)
        yield Writer()

    monkeypatch.setattr(vectors_writer, "started", start)
    questions = model / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": [1, 50 + index] * 5}) + "\n" for index in range(6)))

    status = command(
        monkeypatch, "train", str(model), "--traces", str(questions), "--max-tokens", str(longest), "--epochs", "1"
    )

    assert (0, [(context, False, False)]) == (
        status, [(each.max_model_len, each.guidance, each.steering) for each in started]
    )  # fmt: skip
    assert (model / "budget").resolve() == find_predictor(Settings(), check_model(model))
