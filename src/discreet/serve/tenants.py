"""Who may use the gateway, and how much: keys as hashes, a policy for each tenant, quotas.

Every key has 256 bits of its own, so one SHA-256 is enough to keep. A given key is compared with every hash of every tenant, in constant time and to the end, so that neither a key
nor whose it nearly was can be measured. A tenant's placeholders, pseudonyms and cache salt derive from a key of its own.

A file becomes one frozen `Settings`: a gateway that reads it again takes the new one as a whole or keeps the old one, and a request that is under way keeps what it began with.

Does not cover: quotas that several processes share or that outlive one.
"""

from __future__ import annotations

import hmac
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from discreet.deid import ner
from discreet.deid.operators import Operator
from discreet.deid.patterns import Label
from discreet.deid.policy import Names, Policy
from discreet.errors import AccessDenied, ConfigInvalid, Overloaded, RequestInvalid
from discreet.record import Digest
from discreet.serve.answers import ToolArguments
from discreet.serve.asgi import hash_api_key
from discreet.serve.filters import GUARD, POLICY
from discreet.serve.leaks import GUARDED, Canaries, Guard, OwnIdentifiers
from discreet.serve.oidc import Provider

MAX_TENANTS = 1000


@final
class Unknown(StrEnum):
    """What becomes of the fields and parts of a request that the tables do not know."""

    REFUSE = "refuse"
    DEIDENTIFY = "deidentify"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One group of callers that shares nothing with another.

    Args:
        name: how metrics and logs call it; lower-case letters, digits and hyphens.
        key_hashes: SHA-256 in hex of each of its API keys (`asgi.hash_api_key`).
        policy: of the channel prompt.
        requests_per_minute: quota, >= 1; as many may come at once.
        max_concurrent: requests at one time, >= 1.
        models: those it may ask for; None for all of the upstream's.
        tools: what the arguments of tool calls hold on their way out.
        guard: what a model may not say of its own.
        unknown: what becomes of fields and parts that the tables do not know; images, audio and files are refused whatever it says.
        claim_values: values of the identity provider's claim whose holders belong to it.
    """

    name: str
    key_hashes: tuple[str, ...] = field(repr=False)
    policy: Policy = POLICY
    requests_per_minute: int = 600
    max_concurrent: int = 256
    models: frozenset[str] | None = None
    tools: ToolArguments = ToolArguments.RESTORE
    guard: Guard = GUARD
    unknown: Unknown = Unknown.REFUSE
    claim_values: frozenset[str] = frozenset()
    policy_digest: Digest = field(init=False)

    def __post_init__(self) -> None:
        """Computes the policy's digest once: it reads the weights of the name model."""
        object.__setattr__(self, "policy_digest", self.policy.digest)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may cost.

    Args:
        max_request_bytes: size of a body, >= 1.
        max_chars: text in it, >= 1.
        max_answer_bytes: size of an answer, streamed or not, >= 1.
        max_seconds: time for an answer, > 0.
    """

    max_request_bytes: int = 4_000_000
    max_chars: int = 400_000
    max_answer_bytes: int = 32_000_000
    max_seconds: float = 600.0

    def __post_init__(self) -> None:
        if min(self.max_request_bytes, self.max_chars, self.max_answer_bytes) < 1 or not self.max_seconds > 0:
            raise RequestInvalid("max_request_bytes, max_chars and max_answer_bytes >= 1, and max_seconds > 0")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that a tenants file says.

    Args:
        tenants: who may ask, at least one.
        metrics_key_hash: of the key that reads `/metrics`; None for the tenants' keys.
        provider: whose tokens are believed beside the keys; None for nobody's.
        limits: of one request.
    """

    tenants: tuple[Tenant, ...]
    metrics_key_hash: str | None = None
    provider: Provider | None = None
    limits: Limits = field(default_factory=Limits)


_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Quota = Annotated[int, Field(ge=1, le=1_000_000)]


@final
class _TenantTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    key_sha256: list[_Hash] = []
    claim_values: list[str] = []
    keep: list[Label] = []
    operators: dict[Label, Operator] = {}
    names: Names | None = None
    answers: OwnIdentifiers = OwnIdentifiers.MASK
    answer_labels: list[Label] | None = None
    requests_per_minute: _Quota = 600
    max_concurrent: _Quota = 256
    models: Annotated[list[str], Field(min_length=1)] | None = None
    tool_arguments: ToolArguments = ToolArguments.RESTORE
    unknown: Unknown = Unknown.REFUSE


@final
class _ProviderTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]
    claim: str = "groups"
    keys: Annotated[str, Field(min_length=1)]


_Size = Annotated[int, Field(ge=1)]
_DEFAULTS = Limits()


@final
class _LimitsTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    max_request_bytes: _Size = _DEFAULTS.max_request_bytes
    max_chars: _Size = _DEFAULTS.max_chars
    max_answer_bytes: _Size = _DEFAULTS.max_answer_bytes
    max_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = _DEFAULTS.max_seconds


@final
class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    metrics_key_sha256: _Hash | None = None
    canaries: str | None = None
    oidc: _ProviderTable | None = None
    limits: _LimitsTable = _LimitsTable()
    tenant: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")], _TenantTable], Field(min_length=1, max_length=MAX_TENANTS)]


def load(path: Path, *, policy: Policy = POLICY) -> Settings:
    """Reads a tenants file (docs/gateway.md).

    Args:
        path: the file.
        policy: of the channel prompt, where a tenant says nothing else.

    Raises:
        ConfigInvalid: when it or its file of canaries cannot be read, holds an unknown key, two tenants share a key or a claim's value, or one has neither.
        MissingExtra: when a tenant wants the name model and it is not installed.
    """
    try:
        parsed = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        raise ConfigInvalid("a tenants file in TOML that can be read", value=path.name) from None
    except ValidationError as error:
        at = ".".join(str(part) for part in error.errors(include_url=False, include_input=False)[0]["loc"])
        raise ConfigInvalid("a tenants file as docs/gateway.md has it", value=at) from None
    canaries = _canaries(path, parsed.canaries)
    tenants = tuple(_tenant(name, table, canaries, policy) for name, table in parsed.tenant.items())
    ways = [way for tenant in tenants for way in (*tenant.key_hashes, *tenant.claim_values)]
    if len(set(ways)) < len(ways) or not all(tenant.key_hashes or (tenant.claim_values and parsed.oidc) for tenant in tenants):
        raise ConfigInvalid("every key and every value of the claim to be of one tenant alone, and every tenant to have one", value=path.name)
    provider = None if parsed.oidc is None else Provider(**parsed.oidc.model_dump())
    if provider is not None and not provider.keys.startswith("https://"):
        provider = replace(provider, keys=str(path.parent / provider.keys))
    return Settings(tenants=tenants, metrics_key_hash=parsed.metrics_key_sha256, provider=provider, limits=Limits(**parsed.limits.model_dump()))


def _canaries(path: Path, name: str | None) -> Canaries:
    try:
        return Canaries.of(() if name is None else (path.parent / name).read_text(encoding="utf-8").splitlines())
    except OSError:
        rule = "a file of canaries that can be read"
    except ValueError as error:
        rule = "UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
    raise ConfigInvalid(rule, value=name)


def _tenant(name: str, table: _TenantTable, canaries: Canaries, policy: Policy) -> Tenant:
    names = policy.names if table.names is None else table.names
    if names is Names.MODEL:
        ner.installed()
    changes = {**dict.fromkeys(table.keep, Operator.KEEP), **table.operators}
    if changes or names is not policy.names:
        policy = replace(policy, name=f"{policy.name}/{name}", operators={**policy.operators, **changes}, names=names)
    return Tenant(
        name=name,
        key_hashes=tuple(table.key_sha256),
        policy=policy,
        requests_per_minute=table.requests_per_minute,
        max_concurrent=table.max_concurrent,
        models=None if table.models is None else frozenset(table.models),
        tools=table.tool_arguments,
        unknown=table.unknown,
        guard=Guard(own=table.answers, labels=GUARDED if table.answer_labels is None else frozenset(table.answer_labels), canaries=canaries),
        claim_values=frozenset(table.claim_values),
    )


def bearer(headers: Mapping[str, str]) -> str:
    """Returns what a request shows, as `Authorization: Bearer KEY` (OpenAI) or `x-api-key: KEY` (Anthropic)."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def claimed(tenants: Sequence[Tenant], values: frozenset[str]) -> Tenant:
    """Returns the one tenant to which the values of a verified token's claim belong.

    Raises:
        AccessDenied: when there is none, or more than one.
    """
    found = [tenant for tenant in tenants if not values.isdisjoint(tenant.claim_values)]
    if len(found) != 1:
        raise AccessDenied("a token that belongs to one tenant of this gateway", value=len(found), remedy="Ask its operator.")
    return found[0]


def identify(tenants: Sequence[Tenant], headers: Mapping[str, str]) -> Tenant:
    """Returns the tenant whose key a request has, as `Authorization: Bearer KEY` (OpenAI) or `x-api-key: KEY` (Anthropic).

    Raises:
        AccessDenied: when there is none.
    """
    given = hash_api_key(bearer(headers))
    found = None
    for tenant in tenants:
        for key_hash in tenant.key_hashes:
            if hmac.compare_digest(given, key_hash):
                found = tenant  # no way out here: the time says nothing about the place
    if found is None:
        raise AccessDenied("an API key of this gateway", remedy="Send it as Authorization: Bearer KEY, or as x-api-key: KEY.")
    return found


@final
class Quotas:
    """What each tenant has left: a bucket of requests that fills up over a minute, and a number at one time. In memory, for one event loop."""

    def __init__(self) -> None:
        self._left: dict[str, tuple[float, float]] = {}
        self._running: dict[str, int] = {}

    @contextmanager
    def admitted(self, tenant: Tenant) -> Iterator[None]:
        """Takes one request, and holds its place until it ends.

        Raises:
            Overloaded: when the tenant has used what it may.
        """
        self._take(tenant)
        if self._running.get(tenant.name, 0) >= tenant.max_concurrent:
            raise Overloaded(f"at most {tenant.max_concurrent} requests at one time", remedy="Wait for one to end.")
        self._running[tenant.name] = self._running.get(tenant.name, 0) + 1
        try:
            yield
        finally:
            self._running[tenant.name] -= 1

    def running(self) -> int:
        """Returns how many requests are under way."""
        return sum(self._running.values())

    def _take(self, tenant: Tenant) -> None:
        now = time.monotonic()
        left, then = self._left.get(tenant.name, (float(tenant.requests_per_minute), now))
        left = min(float(tenant.requests_per_minute), left + (now - then) * tenant.requests_per_minute / 60)
        if left < 1:
            self._left[tenant.name] = left, now
            raise Overloaded(f"at most {tenant.requests_per_minute} requests a minute", remedy="Try again shortly.")
        self._left[tenant.name] = left - 1, now
