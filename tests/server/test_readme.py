"""README's first answer is what the wire gives: the same fields, none missing and none made up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from thinkserve.strategies.testing import ScriptedEngine

README = Path(__file__).resolve().parents[2] / "README.md"
# Eight chains of different lengths, so that three finish while five are still thinking.
SCRIPTS = [f"{'so ' * (4 * n + 1)}</think>\n\nThe answer is \\boxed{{195}}." for n in range(8)]


def example() -> tuple[dict[str, Any], dict[str, Any]]:
    """README's first question and its answer."""
    (shown,) = re.findall(r"<!-- ask:begin -->\n(.*?)<!-- ask:end -->", README.read_text(), re.DOTALL)
    (asked,) = re.findall(r"-d '(\{.*?\})'", shown, re.DOTALL)
    (answer,) = re.findall(r"```json\n(.*?)```", shown, re.DOTALL)
    return json.loads(asked), json.loads(answer)


def fields(value: object, path: str = "") -> Iterator[str]:
    """The dotted paths of all fields; items of a list share theirs, and the names in `votes` are answers."""
    if isinstance(value, dict) and not path.endswith(".votes"):
        for key, below in value.items():
            yield f"{path}.{key}"
            yield from fields(below, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from fields(item, path)


def test_the_example_has_the_fields_of_a_real_answer(serve: Callable[..., Any]) -> None:
    """The same request, to a scripted engine; README says that it leaves `reasoning_content` out."""
    asked, shown = example()

    reply = serve(ScriptedEngine(SCRIPTS)).client.post("/v1/chat/completions", json=asked | {"model": "m:race"})
    answer = reply.json()

    assert 200 == reply.status_code
    assert "short-m-at-k" == shown["strategy"]["name"] == answer["strategy"]["name"]
    assert {"started": 8, "finished": 3, "aborted": 5} == answer["usage"]["strategy"]["chains"]
    assert set(fields(answer)) == {*fields(shown), ".choices.message.reasoning_content"}
