"""Callers who come with a token of an identity provider (OpenID Connect) in place of a key.

    token ── header: closed, algorithm on our list, key by id in the provider's set ──> signature ──> issuer, audience, expiry ──> claim ──> tenant

The algorithm is decided here, never by the token: RSA-PSS, RSA, ECDSA and Ed25519 alone, so that neither `none` nor an HMAC under a public key can stand for a signature, and each key is
used with an algorithm of its own type. A key id is looked up by equality in a set that was loaded before; it is no path, no URL and no query, and headers that bring or
locate a key (`jwk`, `jku`, `x5u`, `x5c`) or ask for more (`crit`) are refused. `iss`, `aud` and `exp` must be there and right.

The set is a file, or an address that is resolved, checked and called as the upstream is (`upstream.resolve`): over TLS, no redirects, no private ranges unless listed. It is loaded
when the gateway starts; an unknown key id loads it again, at most one try in `RELOAD_S` seconds, whether it succeeds or not.

Errors say a rule and never a word of the token. Source: RFC 7515, 7517, 7519, 8725 (best current practices), OpenID Connect Core 1.0.

Does not cover: revocation before `exp`, a key that was taken out of the set (until an unknown id or a restart loads it again), encrypted tokens, discovery documents, refresh.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, final

from discreet.errors import AccessDenied, ConfigInvalid, missing_extra

try:
    from joserfc import jwt
    from joserfc.errors import JoseError
    from joserfc.jwk import KeySet
except ImportError as error:
    raise missing_extra("serve", str(error.name)) from None

ALGORITHMS = ("RS256", "PS256", "ES256", "ES384", "Ed25519", "EdDSA")
MAX_TOKEN_CHARS, MAX_KEYS_BYTES = 8_192, 1_000_000
LEEWAY_S, RELOAD_S = 60, 60.0

_TYPES = {"RS256": "RSA", "PS256": "RSA", "ES256": "EC", "ES384": "EC", "Ed25519": "OKP", "EdDSA": "OKP"}
_HEADERS = frozenset(("alg", "kid", "typ"))
_TOKEN = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+){2}")
_REMEDY = "Ask the identity provider for a fresh one."


def looks_like_token(given: str) -> bool:
    """Says whether a bearer has the form of a token rather than of a key of this gateway."""
    return given.count(".") == 2 and not given.startswith("dk-")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """An identity provider that is believed.

    Args:
        issuer: the `iss` of its tokens, to the letter.
        audience: the `aud` that names this gateway.
        claim: whose value, or one of whose values, says the tenant.
        keys: its JSON Web Key Set, a file or an https address.
    """

    issuer: str
    audience: str
    claim: str
    keys: str


@final
@dataclass(slots=True)
class Verifier:
    """Tokens of one provider.

    Args:
        provider: who is believed.
        load: returns the bytes of its key set.
    """

    provider: Provider
    load: Callable[[], Awaitable[bytes]]
    _keys: Mapping[str, Any] = field(default_factory=dict, init=False, repr=False)
    _loaded: float = field(default=float("-inf"), init=False)

    async def open(self) -> None:
        """Loads the key set.

        Raises:
            ConfigInvalid: when it is none.
            UpstreamFailed: when it cannot be had.
        """
        self._loaded = time.monotonic()  # before the try: a provider that is down is not asked by every token
        self._keys = parse_keys(await self.load())

    async def values(self, token: str) -> frozenset[str]:
        """Returns the values of the claim in a token that verifies.

        Raises:
            AccessDenied: when it does not.
        """
        algorithm, key_id = _header(token)
        if key_id not in self._keys and time.monotonic() - self._loaded > RELOAD_S:
            await self.open()
        key = self._keys.get(key_id)
        if key is None or key.key_type != _TYPES[algorithm] or key.get("alg", algorithm) != algorithm or key.get("use", "sig") != "sig":
            _refuse("a token signed with a key of its provider")
        return self._claims(token, key, algorithm)

    def _claims(self, token: str, key: Any, algorithm: str) -> frozenset[str]:
        rules: dict[str, Any] = {
            "iss": {"essential": True, "value": self.provider.issuer},
            "aud": {"essential": True, "value": self.provider.audience},
            "exp": {"essential": True},
        }
        try:
            claims = jwt.decode(token, key, algorithms=[algorithm]).claims
            jwt.JWTClaimsRegistry(leeway=LEEWAY_S, **rules).validate(claims)
        except (JoseError, ValueError, TypeError):
            claims = None
        if claims is None:
            _refuse("a token that verifies, for this gateway, and has not expired")
        value = claims.get(self.provider.claim)
        return frozenset(each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str))


def parse_keys(content: bytes) -> dict[str, Any]:
    """Reads a JSON Web Key Set; keys without an id, symmetric ones and unknown types are left out.

    Raises:
        ConfigInvalid: when it is none, is too large, or no key is left.
    """
    try:
        if len(content) > MAX_KEYS_BYTES:
            raise ValueError
        listed = json.loads(content)["keys"]
        usable = [key for key in listed if key.get("kty") in set(_TYPES.values()) and isinstance(key.get("kid"), str) and "d" not in key]
        found = {key.kid: key for key in KeySet.import_key_set({"keys": usable}).keys if key.kid}
    except (ValueError, TypeError, KeyError, AttributeError, JoseError):
        found = {}
    if not found:
        raise ConfigInvalid("a JSON Web Key Set with public keys that have ids")
    return found


def _header(token: str) -> tuple[str, str]:
    """Returns algorithm and key id of a token whose header is of the one form that is understood."""
    if len(token) > MAX_TOKEN_CHARS or not _TOKEN.fullmatch(token):
        _refuse("a signed token")
    encoded = token.partition(".")[0]
    try:
        header = json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    except (ValueError, binascii.Error):
        header = None
    if not isinstance(header, dict) or not set(header) <= _HEADERS:
        _refuse("a token whose header has alg, kid and typ alone")
    algorithm, key_id = header.get("alg"), header.get("kid")
    if algorithm not in ALGORITHMS or not isinstance(key_id, str):
        _refuse(f"a token signed with one of {', '.join(ALGORITHMS)}, and a key id")
    return algorithm, key_id


def _refuse(rule: str) -> NoReturn:
    raise AccessDenied(rule, remedy=_REMEDY) from None
