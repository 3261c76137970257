"""Every knob of the server, typed and described: defaults < YAML file < environment (`THINKSERVE_*`) < command line.

Imports nothing of ours. Unknown keys are errors; secrets come from the environment or a file, never from the command
line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Helper = Literal["guide", "reward", "verifier"]


class PresetLayer(BaseModel):
    """A modifier below a preset's strategy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    params: dict[str, Any] = Field(default_factory=dict[str, Any])


class Preset(BaseModel):
    """A named strategy with frozen parameters and modifiers, offered to clients as the model `served-name:preset`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: str
    params: dict[str, Any] = Field(default_factory=dict[str, Any])
    over: tuple[PresetLayer, ...] = ()
    description: str = ""


class RemoteSettings(BaseModel):
    """How a model on another server is reached, beyond its address; times in seconds, sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str | None = Field(None, description="Which of the server's models; default: the only one.")
    key_env: str | None = Field(None, description="Environment variable that holds the API key.")
    ca_file: Path | None = Field(None, description="Certificates to trust instead of the usual ones.")
    connect_timeout_s: float = Field(5.0, gt=0, description="Longest wait for a connection.")
    read_timeout_s: float = Field(120.0, gt=0, description="Longest silence of the server.")
    write_timeout_s: float = Field(30.0, gt=0, description="Longest wait while a request is sent.")
    pool_timeout_s: float = Field(30.0, gt=0, description="Longest wait for one of the connections.")
    max_connections: int = Field(128, ge=1, description="Requests at once.")
    retries: int = Field(2, ge=0, description="How often a request that failed before its first token is tried again.")
    longest_wait_s: float = Field(30.0, ge=0, description="Longest pause before a retry, whatever the server asks for.")
    breaker_failures: int = Field(5, ge=1, description="Failures in a row after which nothing is sent for a while.")
    breaker_cooldown_s: float = Field(10.0, ge=0, description="How long that while is.")
    max_line_bytes: int = Field(4 << 20, ge=1, description="Longest line of a stream.")
    max_stream_bytes: int = Field(512 << 20, ge=1, description="Longest stream.")
    max_body_bytes: int = Field(64 << 20, ge=1, description="Longest answer that is no stream.")
    reasoning_open: str = Field("<think>", description="Tag that opens thinking, of a model with its own tokenizer.")
    reasoning_close: str = Field("</think>", description="Tag that closes it.")
    reward_format: str | None = Field(None, description="Family of a reward model that does not tell.")
    begin: str = Field("", description="Text of the token that begins a sequence, if the tokenizer has one.")


def default_presets() -> dict[str, Preset]:
    """The presets that README shows."""
    return {
        "race": Preset(strategy="short-m-at-k", params={"k": 8, "m": 3}, description="vote of the 3 shortest of 8"),
        "fast": Preset(strategy="short-m-at-k", params={"k": 4, "m": 1}, description="the first of 4 to finish"),
        "majority": Preset(strategy="majority", params={"k": 8}, description="vote over 8 chains"),
        "deep": Preset(strategy="majority", params={"k": 32}, description="vote over 32 chains"),
    }


class Settings(BaseSettings):
    """The effective configuration of one server process."""

    model_config = SettingsConfigDict(env_prefix="THINKSERVE_", extra="forbid", frozen=True, env_nested_delimiter="__")

    model: str | None = Field(None, description="Directory or name of the model; default: the embedded arith-small.")
    served_name: str | None = Field(None, description="Name clients use; default: the last part of the model's path.")
    guide: str | None = Field(
        None, description="Model that helps thinking: directory, name, http(s) URL of a vLLM server, or 'none'."
    )
    reward: str | None = Field(None, description="Process reward model that scores steps: as guide.")
    verifier: str | None = Field(None, description="Model that answers yes or no about thoughts: as guide.")
    host: str = Field("127.0.0.1", description="Address to bind.")
    port: int = Field(8000, ge=0, le=65535, description="Port to bind; 0 picks a free one.")
    api_keys: SecretStr | None = Field(None, description="Comma-separated API keys; unset: no authentication.")
    api_keys_file: Path | None = Field(None, description="File with one API key per line; read at start.")
    admin_keys: SecretStr | None = Field(
        None, description="Comma-separated keys that may also change the server's steering vectors; unset: nobody may."
    )
    admin_keys_file: Path | None = Field(None, description="File with one admin key per line; read at start.")
    public_routes: tuple[str, ...] = Field(
        ("/health", "/livez", "/readyz", "/version"), description="Paths that need no key when keys are set."
    )
    allowed_hosts: tuple[str, ...] = Field(
        (), description="Host headers that are answered; none given: all, without keys on a loopback address its names."
    )
    default_strategy: str = Field("single", description="Strategy when the request names none.")
    presets: dict[str, Preset] = Field(
        default_factory=default_presets, description="Named strategies, offered as the model `name:preset`."
    )
    effort_map: dict[Effort, str] = Field(
        default_factory=dict[Effort, str], description="reasoning_effort -> preset; empty: effort only sets the budget."
    )
    usage_scope: Literal["all", "winner"] = Field("all", description="Which chains usage.completion_tokens counts.")
    max_chains: int = Field(64, ge=1, description="Most chains one request may run.")
    max_request_tokens: int = Field(1_000_000, ge=1, description="Most tokens of one request, all chains together.")
    max_inflight: int = Field(256, ge=1, description="Most requests at work at once; more are answered 503.")
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="Largest request body in bytes.")
    request_timeout_s: float = Field(570.0, gt=0, description="Deadline of a request that names none, in seconds.")
    idle_timeout_s: int = Field(75, gt=0, description="Seconds for which a connection without a request is kept.")
    keep_alive_s: float = Field(10.0, gt=0, description="Seconds of silence after which a stream gets a comment.")
    drain_timeout_s: float = Field(120.0, ge=0, description="Seconds that requests may go on after SIGTERM.")
    log_json: bool = Field(False, description="One JSON line per request instead of text.")
    # Engine
    remote: dict[Helper, RemoteSettings] = Field(
        default_factory=dict[Helper, RemoteSettings],
        description="For roles on other servers: how those are reached.",
    )
    dtype: str = Field("auto", description="Weights' type in the engine.")
    max_model_len: int | None = Field(None, ge=16, description="Context in tokens; default: the model's own.")
    max_num_seqs: int = Field(128, ge=1, description="Most sequences decoded at once.")
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="Size of the model's KV cache in GiB; default: 1 on a CPU, on a GPU what its share holds.",
    )
    role_kv_gib: dict[Helper, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict[Helper, float],
        description="The same for guide, reward and verifier; default: 0.5 on a CPU, on a GPU what the share holds.",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of GPU memory that all models take together, each by its weights and cache."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs per model.")
    enforce_eager: bool | None = Field(None, description="Skip torch.compile; default: on CPU yes, on GPU no.")
    reasoning_open: str = Field("<think>", description="Tag that opens thinking.")
    reasoning_close: str = Field("</think>", description="Tag that closes thinking.")
    steering: bool = Field(True, description="Let requests steer activations by the vectors of this server.")
    steering_exact: bool = Field(
        False, description="Under torch.compile: unsteered requests keep the bits of an engine without steering."
    )
    guidance: bool = Field(True, description="Let requests be guided to a budget, if the model has a predictor.")
    budget_predictor: Path | None = Field(
        None, description="Folder of the budget predictor; default: budget/ in the model's folder, if it is there."
    )
    vectors_dir: Path | None = Field(None, description="Folder of steering vectors; default: vectors/ in the model's.")
