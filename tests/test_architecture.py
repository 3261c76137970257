"""The rules of the house, walked over every file: who may import whom, how long things are, what is never written."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("server", "strategies", "steering", "guidance", "kernels", "train")
SHIPPED = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
OURS = SHIPPED + sorted(file for folder in ("tests", "bench") for file in (ROOT / folder).rglob("*.py"))

# What each package may import besides the standard library and itself. server: everything the wheel depends on.
ALLOWED = {
    "server": {
        "thinkserve.strategies", "thinkserve.steering", "anyio", "fastapi", "h11", "pydantic", "pydantic_core",
        "pydantic_settings", "prometheus_client", "rich", "starlette", "tokenizers", "huggingface_hub", "typer",
        "typing_extensions", "uvicorn", "uvloop", "yaml",
    },
    "strategies": {"anyio", "pydantic", "pydantic_core"},
    "steering": {"torch", "transformers"},
    "guidance": {"torch", "transformers", "safetensors", "thinkserve.steering", "thinkserve.train"},
    "kernels": {"torch", "triton"},
    "train": {"torch", "transformers", "tokenizers", "safetensors", "numpy", "rich", "typer", "thinkserve.strategies"},
}  # fmt: skip
# Single files that may import more: the engine's adapter, the killable worker that knows mathematics, evaluation,
# and the problems with exact answers that steering vectors are made from on request, read as the server reads answers.
ALLOWED_TO = {
    "server/vllm_": {"vllm", "torch", "transformers", "numpy"},
    "server/remote_": {"httpx"},
    "server/vllm_guidance.py": {"thinkserve.guidance"},
    "server/cli_budget.py": {"torch", "thinkserve.guidance"},
    "server/vllm_worker": {"thinkserve.kernels", "thinkserve.guidance"},
    "train/vllm_sample.py": {"vllm"},
    "steering/questions.py": {"thinkserve.strategies", "thinkserve.train"},
    "strategies/math_worker.py": {"math_verify", "latex2sympy2_extended", "sympy"},
}
# Bottom modules import nothing of ours.
BOTTOM = ("strategies/engine.py", "strategies/errors.py", "strategies/seeds.py", "server/settings.py")


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed)


def forbidden(file: Path) -> list[str]:
    package = file.relative_to(ROOT).parts[0]
    allowed = ALLOWED[package] | {f"thinkserve.{package}"}
    for prefix, more in ALLOWED_TO.items():
        if name_of(file).startswith(prefix):
            allowed = allowed | more
    strangers = [name for name in imports(file) if name.split(".")[0] not in sys.stdlib_module_names]
    return [name for name in strangers if not within(name, allowed)]


@pytest.mark.parametrize("file", SHIPPED, ids=name_of)
def test_a_module_imports_only_what_its_package_may(file: Path) -> None:
    """server -> strategies; vLLM behind vllm_* alone; strategies and kernels know nobody."""
    assert [] == forbidden(file)


@pytest.mark.parametrize("name", BOTTOM)
def test_bottom_modules_import_nothing_of_ours(name: str) -> None:
    """But each other: they can be read first and imported from anywhere."""
    bottom = tuple("thinkserve." + each.removesuffix(".py").replace("/", ".") for each in BOTTOM)
    ours = [module for module in imports(ROOT / name) if module.startswith("thinkserve")]
    assert [] == [module for module in ours if not module.startswith(bottom)]


@pytest.mark.parametrize("source", ["import vllm", "from thinkserve.server import cli", "from . import x"])
def test_the_import_rule_can_fail(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy that imports any of these is reported."""
    file = tmp_path / "strategies" / "bad.py"
    file.parent.mkdir()
    file.write_text(source)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)

    assert [] != forbidden(file)


@pytest.mark.parametrize("file", OURS, ids=name_of)
def test_files_and_functions_fit_on_a_screen_or_few(file: Path) -> None:
    """At most 300 lines a file (tests and bench: 400) and 60 a function (the aim is 40)."""
    text = file.read_text()
    limit = 300 if file in SHIPPED else 400
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]

    assert len(text.splitlines()) <= limit
    assert [] == [n.name for n in functions if (n.end_lineno or 0) - n.lineno >= 60]


@pytest.mark.parametrize("file", SHIPPED, ids=name_of)
def test_a_check_is_never_an_assert(file: Path) -> None:
    """`python -O` drops asserts; a user's mistake is an error with a message, an impossible state raises."""
    assert [] == [node.lineno for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("file", SHIPPED, ids=name_of)
def test_every_concurrent_thing_has_a_parent(file: Path) -> None:
    """No task without a task group: nothing may outlive the request that started it."""
    calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    names = [func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in calls]

    assert [] == [name for name in names if name in {"create_task", "ensure_future", "run_coroutine_threadsafe"}]


@pytest.mark.parametrize("file", OURS, ids=name_of)
def test_every_file_says_what_it_is(file: Path) -> None:
    """The first statement of every module is its docstring."""
    assert ast.get_docstring(ast.parse(file.read_text()))


def test_kernels_is_no_regular_package() -> None:
    """An `__init__.py` there would shadow Hugging Face's `kernels` whenever the checkout is on sys.path."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_tests_are_no_package() -> None:
    """importlib mode needs none, and two tests may have the same name."""
    assert [] == list((ROOT / "tests").rglob("__init__.py"))
