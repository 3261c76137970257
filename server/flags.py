"""Command-line options made from the settings, so that a setting has one definition: name, type, default and help."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from thinkserve.server.config import Config, load
from thinkserve.server.settings import Settings

ENGINE = frozenset({
    "budget_predictor", "dtype", "enforce_eager", "gpu_memory_utilization", "guidance", "guide", "kv_cache_gib",
    "max_model_len", "max_num_seqs", "reasoning_close", "reasoning_open", "reward", "steering", "tensor_parallel_size",
    "vectors_dir", "verifier",
})  # fmt: skip
MODEL = Annotated[str | None, typer.Argument(help=Settings.model_fields["model"].description, show_default=False)]
FILE = Annotated[
    Path | None, typer.Option("--config", envvar="THINKSERVE_CONFIG", help="YAML file of settings.", metavar="FILE")
]


def from_settings(command: Callable[[Config], None]) -> Callable[..., None]:
    """A command for typer whose options are the settings; `command` gets them merged with file and environment."""

    def run(**values: Any) -> None:
        file = values.pop("config")
        command(load({name: value for name, value in values.items() if value not in (None, [])}, file))

    options = {name: option for name, field in Settings.model_fields.items() if (option := _option(name, field))}
    hints = {"model": MODEL, "config": FILE, **options}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, keyword, default=None, annotation=hint) for name, hint in hints.items()]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = hints
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _option(name: str, field: FieldInfo) -> Any:
    """The annotation of one setting's option; None when it has none: secrets, nested settings and the model."""
    kinds = [kind for kind in _members(field.annotation) if kind is not type(None)]
    if name == "model" or SecretStr in kinds or get_origin(kinds[0]) is dict:
        return None
    many = get_origin(kinds[0]) is tuple
    kind: Any = list[str] if many else kinds[0]
    flag = "--" + name.replace("_", "-")
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=f"{field.description}{_shown(field.default)}",
        rich_help_panel="Engine" if name in ENGINE else "Server",
    )
    return Annotated[kind | None, option]


def _members(annotation: Any) -> Iterator[Any]:
    union = get_origin(annotation) is not None and type(None) in get_args(annotation)
    yield from get_args(annotation) if union else (annotation,)


def _shown(default: Any) -> str:
    if default is None or default is False:
        return ""
    # In round brackets: square ones are markup to the help's renderer, which would drop them.
    return f" (default: {', '.join(default) if isinstance(default, tuple) else default})"
