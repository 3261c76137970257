"""Which models a server runs: what serves each role, loaded once, with its share of the memory.

Everything here is known from settings and folders, before the engine's slow imports. With no model named the embedded
family fills all roles; a model that is named stands alone until others are named beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from thinkserve.server.model_dir import MODELS, ModelDir, StartError, find_model
from thinkserve.server.reward_formats import format_of, is_reward_model
from thinkserve.server.settings import Helper, Settings
from thinkserve.server.vocabulary import difference
from thinkserve.strategies.engine import Role

HELPERS: tuple[Helper, ...] = ("guide", "reward", "verifier")
EMBEDDED_HELPERS: dict[Helper, str] = {"guide": "arith-large", "verifier": "arith-large", "reward": "arith-prm"}
NONE = "none"
CPU_KV_GIB = 1.0
CPU_HELPER_KV_GIB = 0.5
# Nobody knows beforehand what a cache should hold on a GPU: without a size, a model's share of the memory counts this
# much for it beside the weights. Helpers read much and write little.
GPU_KV_GIB = 16.0
GPU_HELPER_KV_GIB = 4.0
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Local:
    """A model to load, and the roles it serves. `kv_gib` None: what `gpu_share` of the GPU's memory leaves."""

    roles: tuple[Role, ...]
    model: ModelDir
    name: str
    kv_gib: float | None = None
    gpu_share: float = 1.0

    @property
    def target(self) -> bool:
        """Whether this is the model that answers."""
        return "target" in self.roles


@dataclass(frozen=True, slots=True)
class Remote:
    """A role that another server fills."""

    role: Helper
    url: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """All models of a server; the first local one is the target."""

    local: tuple[Local, ...]
    remote: tuple[Remote, ...] = ()

    @property
    def target(self) -> Local:
        """The model that answers."""
        return self.local[0]


def plan_models(settings: Settings, cpu: bool) -> Deployment:
    """What to load and what to call. Raises StartError for models that are not there or do not fit together."""
    found = [_target(settings)]
    remote = list[Remote]()
    for role in HELPERS:
        source = _source(settings, role)
        if source is None:
            continue
        if source.startswith(("http://", "https://")):
            remote.append(Remote(role, _checked_url(role, source)))
        else:
            _add(found, role, find_model(source))
    _check(found)
    named = [_named(place, found) for place in found]
    return Deployment(tuple(_with_memory(named, settings, cpu)), tuple(remote))


def target_alone(settings: Settings, cpu: bool) -> Local:
    """The model that answers, as if it were the only one. Raises StartError."""
    return next(_with_memory([_target(settings)], settings, cpu))


def _target(settings: Settings) -> Local:
    model = find_model(settings.model)
    return Local(("target",), model, settings.served_name or model.name)


def _source(settings: Settings, role: Helper) -> str | None:
    named: str | None = getattr(settings, role)
    if named is not None or settings.model is not None:
        return None if named == NONE else named
    embedded = MODELS / EMBEDDED_HELPERS[role]
    return str(embedded) if embedded.is_dir() else None


def _checked_url(role: Helper, url: str) -> str:
    try:
        parts = urlsplit(url)
        fits = bool(parts.hostname) and parts.username is None and (parts.port or 1) > 0
        fits = fits and not parts.query and not parts.fragment
    except ValueError:
        fits = False
    if not fits:
        raise StartError(f"{role}: not the address of a server (http://host:port, without a password)")
    return url.rstrip("/")


def _add(found: list[Local], role: Role, model: ModelDir) -> None:
    for index, place in enumerate(found):
        if place.model.path == model.path:
            found[index] = replace(place, roles=(*place.roles, role))
            return
    found.append(Local((role,), model, model.name))


def _check(found: list[Local]) -> None:
    for place in found:
        rates, writes = "reward" in place.roles, [role for role in place.roles if role != "reward"]
        if rates:
            format_of(place.model)
        if writes and (rates or is_reward_model(place.model)):
            raise StartError(f"{place.model.path} ({place.model.architecture}) rates steps; it is no {writes[0]}")
        if "guide" in place.roles and not place.target and (found_out := difference(found[0].model, place.model)):
            raise StartError(f"The guide {place.name} does not fit {found[0].name}: {found_out}")


def _named(place: Local, all_places: list[Local]) -> Local:
    """Metrics and banner tell models apart by name."""
    taken = any(other.name == place.name for other in all_places if other is not place)
    return replace(place, name=f"{place.name}-{place.roles[0]}") if taken and not place.target else place


def _with_memory(places: list[Local], settings: Settings, cpu: bool) -> Iterator[Local]:
    """Each with its cache, the largest that one of its roles is to have; the GPU is shared by weights and cache."""
    sizes = [_kv_gib(place, settings) for place in places]
    needs = [
        place.model.weight_bytes / GIB + (size or (GPU_KV_GIB if place.target else GPU_HELPER_KV_GIB))
        for place, size in zip(places, sizes, strict=True)
    ]
    for place, size, need in zip(places, sizes, needs, strict=True):
        default = (CPU_KV_GIB if place.target else CPU_HELPER_KV_GIB) if cpu else None
        share = settings.gpu_memory_utilization * need / sum(needs)
        yield replace(place, kv_gib=size or default, gpu_share=share)


def _kv_gib(place: Local, settings: Settings) -> float | None:
    asked = [settings.kv_cache_gib if role == "target" else settings.role_kv_gib.get(role) for role in place.roles]
    return max((gib for gib in asked if gib is not None), default=None)
