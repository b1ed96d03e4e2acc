"""Who may use the gateway, and how much: keys as hashes, a policy for each tenant, quotas.

Every key has 256 bits of its own, so one SHA-256 is enough to keep. A given key is compared with every hash of every tenant, in constant time and to the end, so that neither a key
nor whose it nearly was can be measured. A tenant's placeholders, pseudonyms and cache salt derive from a key of its own.

Does not cover: identities of an OIDC provider, quotas that several processes share or that outlive one.
"""

from __future__ import annotations

import hmac
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from discreet.deid.operators import Operator
from discreet.deid.patterns import Label
from discreet.deid.policy import Policy
from discreet.errors import AccessDenied, ConfigInvalid, Overloaded
from discreet.serve.answers import ToolArguments
from discreet.serve.asgi import hash_api_key
from discreet.serve.filters import GUARD, POLICY
from discreet.serve.leaks import Guard

MAX_TENANTS = 1000


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
    """

    name: str
    key_hashes: tuple[str, ...] = field(repr=False)
    policy: Policy = POLICY
    requests_per_minute: int = 600
    max_concurrent: int = 256
    models: frozenset[str] | None = None
    tools: ToolArguments = ToolArguments.RESTORE
    guard: Guard = GUARD


_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Quota = Annotated[int, Field(ge=1, le=1_000_000)]


@final
class _TenantTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    key_sha256: Annotated[list[_Hash], Field(min_length=1)]
    keep: list[Label] = []
    requests_per_minute: _Quota = 600
    max_concurrent: _Quota = 256
    models: Annotated[list[str], Field(min_length=1)] | None = None
    tool_arguments: ToolArguments = ToolArguments.RESTORE


@final
class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    metrics_key_sha256: _Hash | None = None
    tenant: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")], _TenantTable], Field(min_length=1, max_length=MAX_TENANTS)]


def load(path: Path) -> tuple[tuple[Tenant, ...], str | None]:
    """Reads a tenants file (docs/gateway.md); returns the tenants and the hash of the key that reads the metrics.

    Raises:
        ConfigInvalid: when it cannot be read, holds an unknown key, or two tenants share a key.
    """
    try:
        parsed = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        raise ConfigInvalid("a tenants file in TOML that can be read", value=path.name) from None
    except ValidationError as error:
        at = ".".join(str(part) for part in error.errors(include_url=False, include_input=False)[0]["loc"])
        raise ConfigInvalid("a tenants file as docs/gateway.md has it", value=at) from None
    tenants = tuple(_tenant(name, table) for name, table in parsed.tenant.items())
    hashes = [key_hash for tenant in tenants for key_hash in tenant.key_hashes]
    if len(set(hashes)) < len(hashes):
        raise ConfigInvalid("every key to be of one tenant alone", value=path.name)
    return tenants, parsed.metrics_key_sha256


def _tenant(name: str, table: _TenantTable) -> Tenant:
    operators = {label: Operator.KEEP if label in table.keep else operator for label, operator in POLICY.operators.items()}
    return Tenant(
        name=name,
        key_hashes=tuple(table.key_sha256),
        policy=replace(POLICY, name=f"prompt/{name}", operators=operators) if table.keep else POLICY,
        requests_per_minute=table.requests_per_minute,
        max_concurrent=table.max_concurrent,
        models=None if table.models is None else frozenset(table.models),
        tools=table.tool_arguments,
    )


def identify(tenants: Sequence[Tenant], headers: Mapping[str, str]) -> Tenant:
    """Returns the tenant whose key a request has, as `Authorization: Bearer KEY` (OpenAI) or `x-api-key: KEY` (Anthropic).

    Raises:
        AccessDenied: when there is none.
    """
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = hash_api_key(bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
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
