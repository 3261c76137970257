"""What an operator sees of a start: one line that moves while the engine loads, then the address and a line to copy.

No thread draws here: the engine core is forked from this process, and a thread could hold a lock at that moment. The
line moves with the imports instead, which are what takes the time.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.live import Live
from rich.text import Text

from thinkserve.server import __version__
from thinkserve.server.deployment import Deployment
from thinkserve.server.plan import ServedModel
from thinkserve.strategies.engine import Role

EVERY_S = 0.1
QUESTION = "Start with 17. Add 48. Multiply by 3. What is the result?"
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what to call when the server listens everywhere


def loading_models(console: Console, deployment: Deployment, cpu: bool) -> None:
    """Print what is about to be loaded, one line per model."""
    for place in deployment.local:
        model, megabytes = place.model, round(place.model.weight_bytes / 1e6)
        cache = f"{place.gpu_share:.0%} of its memory" if place.kv_gib is None else f"{place.kv_gib:g} GiB of KV cache"
        device = "CPU" if cpu else "GPU"
        line = f"loading {place.name} ({model.architecture}, {megabytes} MB) on {device} with {cache}"
        console.print(Text(line), soft_wrap=True)


def loaded_models(console: Console, deployment: Deployment, models: Mapping[Role, ServedModel]) -> None:
    """Print which model serves which role, and how many tokens its cache holds."""
    for place in deployment.local:
        held = f"{models[place.roles[0]].kv_tokens:,} tokens of cache"
        console.print(Text(f"  {', '.join(place.roles)}: {place.name}, {held}"), soft_wrap=True)
    for remote in deployment.remote:
        console.print(Text(f"  {remote.role}: {models[remote.role].info.name} at {remote.url}"), soft_wrap=True)


class Loading:
    """A finder that finds nothing and counts what is looked for; it redraws the line at most every EVERY_S."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._parent = os.getpid()
        self._begin = self._drawn = monotonic()
        self._modules = 0

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Part of Python's import protocol: None leaves the search to the other finders."""
        self._modules += 1
        now = monotonic()
        if now - self._drawn >= EVERY_S and os.getpid() == self._parent:
            self._drawn = now
            text = f"  loading the engine: {now - self._begin:4.1f} s, {self._modules} modules"
            self._live.update(Text(text, style="dim"), refresh=True)


@contextmanager
def loading(console: Console) -> Iterator[None]:
    """Show progress while the block imports and starts the engine; on a terminal only."""
    if not console.is_terminal:
        yield
        return
    with Live(
        console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as live:
        finder = Loading(live)
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)


def started(console: Console, url: str, model: str, preset: str | None, seconds: float, keyed: bool) -> None:
    """Print where the server is and how to ask it something."""
    words = f" {__version__} is ready after {seconds:.1f} s: "
    title = Text.assemble(("thinkserve", "bold"), words, (url, "bold green"))
    console.print(title, soft_wrap=True)
    console.print(Text(curl(url, f"{model}:{preset}" if preset else model, keyed)), soft_wrap=True)


def curl(url: str, model: str, keyed: bool) -> str:
    """A shell line that asks the server a question."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": QUESTION}]})
    words = ["curl", "-s", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    line = shlex.join([*words, "-d", body])
    return f'{line} -H "Authorization: Bearer $API_KEY"' if keyed else line


def address(host: str, port: int) -> str:
    """The URL under which a client on this machine reaches the server."""
    host = EVERYWHERE.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
