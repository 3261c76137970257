"""Where settings come from: defaults < YAML file < environment (`THINKSERVE_*`) < command line.

A key that no setting has is an error, wherever it stands, and so is a value that does not fit: both are told in one
line with the place and, for a misspelt name, the nearest that exists. Secrets come from the environment or a file of
their own: never from the command line (every user of the machine sees it), never from the YAML file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource
from pydantic_settings.exceptions import SettingsError

from thinkserve.server.model_dir import StartError
from thinkserve.server.settings import Preset, PresetLayer, RemoteSettings, Settings
from thinkserve.server.validation import nearest

PREFIX = "THINKSERVE_"
# Variables that are no settings: the configuration file itself, and what the kernels read before there are settings.
OTHER_VARIABLES = frozenset({"THINKSERVE_CONFIG", "THINKSERVE_KERNELS", "THINKSERVE_CACHE"})
SECRETS = frozenset({"admin_keys", "api_keys"})


@dataclass(frozen=True, slots=True)
class Config:
    """The effective settings, and for each one that somebody has set, where: `--port`, `THINKSERVE_PORT`, a file."""

    settings: Settings
    origin: Mapping[str, str]


def load(flags: Mapping[str, Any], file: Path | None) -> Config:
    """Merge all sources. `flags` holds what the command line has set, by setting. Raises StartError."""
    environment = _environment()
    content = {} if file is None else _from_file(file)
    origin = {
        **{name: str(file) for name in content},
        **{name: PREFIX + name.upper() for name in environment},
        **{name: "--" + name.replace("_", "-") for name in flags},
    }
    try:
        settings = Settings(**_merged(_merged(content, environment), flags))
    except ValidationError as error:
        raise StartError(_complaint(error, origin)) from None
    return Config(settings, origin)


def redacted(config: Config) -> str:
    """The effective configuration as a YAML file, each line with its origin; secrets are starred out."""
    values = config.settings.model_dump(mode="json")
    lines: list[str] = []
    for name, value in values.items():
        text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=1000).rstrip("\n")
        first, *rest = text.split("\n")
        # A secret is shown commented out: a file that holds one is refused.
        hidden = "# " if name in SECRETS else ""
        lines += [f"{hidden}{first}  # {config.origin.get(name, 'default')}", *rest]
    return "\n".join(lines) + "\n"


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """What lies above wins, entry by entry: a variable that sets one field of a model leaves the file's others."""
    both = {
        name: _merged(below[name], value)
        for name, value in above.items()
        if isinstance(value, Mapping) and isinstance(below.get(name), Mapping)
    }
    return {**below, **above, **both}


def _environment() -> dict[str, Any]:
    for variable in os.environ:
        if variable.upper().startswith(PREFIX) and variable.upper() not in OTHER_VARIABLES:
            whole = variable[len(PREFIX) :].lower()
            name = whole.split("__")[0]
            # Only these have something below them; API_KEYS__FILE would be passed over, and leave the server open.
            nested = name in Settings.model_fields and get_origin(Settings.model_fields[name].annotation) is dict
            _known(name if nested else whole, variable, Settings.model_fields, PREFIX)
    try:
        return EnvSettingsSource(Settings)()
    except SettingsError as error:
        field = str(error).split('"')[1]
        raise StartError(f"Setting {PREFIX}{field.upper()} must be JSON, like '[\"a\", \"b\"]' or '{{...}}'") from None


def _from_file(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartError(f"Cannot read the configuration {file}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise StartError(f"Not a YAML file: {file}{where}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise StartError(f"The configuration {file} must be a mapping of settings")
    settings = {str(name): value for name, value in cast(dict[object, Any], content).items()}
    for name in settings:
        _known(name, f"{name} in {file}", Settings.model_fields)
        if name in SECRETS:
            variable = PREFIX + name.upper()
            raise StartError(f"{name} does not belong into {file}: set {variable}, or name a file in {name}_file")
    return settings


def _known(name: str, shown: str, names: Iterable[str], prefix: str = "") -> None:
    known = list(names)
    if name not in known:
        shape = (lambda text: prefix + text.upper()) if prefix else str
        hint = nearest(shape(name), map(shape, known))
        raise StartError(f"Unknown setting {shown}.{hint}")


def _complaint(error: ValidationError, origin: Mapping[str, str]) -> str:
    details = error.errors(include_url=False, include_input=False)
    # A misspelt field is also a missing one; its name tells more.
    detail = min(details, key=lambda one: one["type"] != "extra_forbidden")
    path = [str(part) for part in detail["loc"]]
    place = origin.get(path[0], path[0])
    shown = ".".join(path) if len(path) > 1 else path[0]
    where = "" if place == path[0] else f" ({place})"
    if detail["type"] == "extra_forbidden":
        layer = PresetLayer if "over" in path[:-1] else Preset
        fields = (RemoteSettings if path[0] == "remote" else layer).model_fields
        return f"Unknown setting {shown}{where}.{nearest(path[-1], fields)}"
    return f"Setting {shown}{where}: {_reason(detail)}"


def _reason(detail: ErrorDetails) -> str:
    text = detail["msg"]
    return text[:1].lower() + text[1:]
