"""What can be known of a model before vLLM or torch is imported: is it there, is it whole, how big is it.

A wrong path is the operator's most common mistake, so it is told in one line before the slow imports start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

EMBEDDED = "arith-small"
# The models folder lies beside this package, in a checkout and in an installed wheel alike.
MODELS = Path(__file__).resolve().parents[1] / "models"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")


class StartError(Exception):
    """The server cannot start; the message is one line for the operator."""


def one_line(error: Exception, said: str | None = None) -> str:
    """The first line of what an error says (or of what was `said` instead) that is not blank; else its kind."""
    lines = (str(error) if said is None else said).splitlines()
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)


@dataclass(frozen=True, slots=True)
class ModelDir:
    """A checked model directory. `weight_bytes` is the size of its safetensors files together.

    `hub_name` is its Hugging Face name, if it was asked for by that: its folder is called after a commit.
    """

    path: Path
    architecture: str
    weight_bytes: int
    hub_name: str = ""

    @property
    def name(self) -> str:
        """The name that clients use unless the operator chose another."""
        return self.hub_name.rpartition("/")[2] or self.path.name

    @property
    def small(self) -> bool:
        """Whether one core is enough: more threads or processes would only wait for each other."""
        return self.weight_bytes < 256 * 2**20

    def has_tokens(self, *texts: str) -> bool:
        """Whether each text is one token of the fast tokenizer."""
        # Comes with vLLM; without an engine installed this module must still be importable.
        from tokenizers import Tokenizer

        file = self.path / "tokenizer.json"
        if not file.is_file():
            return False
        tokenizer = Tokenizer.from_file(str(file))
        return all(tokenizer.token_to_id(text) is not None for text in texts)


def find_model(model: str | None) -> ModelDir:
    """Locate and check a model: a directory, a Hugging Face name, or None for the embedded one. Raises StartError."""
    if model is None:
        return check_model(MODELS / EMBEDDED)
    path = Path(model).expanduser()
    if path.is_dir() or path.exists() or not _is_hub_name(model):
        return check_model(path)
    return replace(check_model(_from_hub(model)), hub_name=model)


def check_model(path: Path) -> ModelDir:
    """Check that `path` holds a configuration, a tokenizer and whole safetensors weights. Raises StartError."""
    if not path.is_dir():
        raise StartError(f"Model directory not found: {path}")
    config = _read_json(path / "config.json")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise StartError(f"Not a language model: no architectures in {path / 'config.json'}")
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise StartError(f"No tokenizer in {path} (looked for {', '.join(_TOKENIZERS)})")
    return ModelDir(path.resolve(), str(architectures[0]), sum(_weights(path)))


def _weights(path: Path) -> Iterator[int]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({path / str(name) for name in _read_json(index).get("weight_map", {}).values()})
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise StartError(f"No safetensors weights in {path}")
    for file in files:
        yield _check_safetensors(file)


def _check_safetensors(file: Path) -> int:
    """Size in bytes of a whole safetensors file: an 8-byte header length, the JSON header, then all tensors' bytes."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if 0 < length <= size - 8 else None
    except OSError as error:
        raise StartError(f"Cannot read weights: {file}: {error.strerror}") from error
    except ValueError as error:
        raise StartError(f"Weights are damaged (not a safetensors file): {file}") from error
    if not isinstance(header, dict):
        raise StartError(f"Weights are damaged (not a safetensors file): {file}")
    tensors = cast(dict[str, dict[str, Any]], header)
    end = max(
        (entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"),
        default=0,
    )
    if 8 + length + end != size:
        raise StartError(f"Weights are incomplete: {file} has {size} bytes, its header promises {8 + length + end}")
    return size


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StartError(f"No {file.name} in {file.parent}") from error
    except (OSError, ValueError) as error:
        raise StartError(f"Cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise StartError(f"Cannot read {file}: not a JSON object")
    return cast(dict[str, Any], content)


def _is_hub_name(model: str) -> bool:
    owner, _, name = model.partition("/")
    return bool(owner and name) and "/" not in name and not model.startswith((".", "~", "/"))


def _from_hub(name: str) -> Path:
    """The local snapshot of a Hugging Face repository, downloaded when it is not in the cache yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model"]
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        pass
    except ValueError:
        # Not a name that a repository could have, so a directory was meant.
        raise StartError(f"Model directory not found: {name}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise StartError(
            f"Model {name!r} is neither a directory nor to be had from Hugging Face: {one_line(error)}"
        ) from error
