"""Tokens: verified with the provider's keys and our algorithms, for this gateway, in time; everything else is refused (PITFALLS 31)."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import time

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, OKPKey, RSAKey

from discreet.errors import AccessDenied, ConfigInvalid, UpstreamFailed
from discreet.serve import oidc, upstream
from discreet.serve.oidc import Provider, Verifier, looks_like_token, parse_keys

KEYS = {
    "RS256": RSAKey.generate_key(2048, parameters={"kid": "rsa"}),
    "PS256": RSAKey.generate_key(2048, parameters={"kid": "pss"}),
    "ES256": ECKey.generate_key("P-256", parameters={"kid": "ec"}),
    "Ed25519": OKPKey.generate_key("Ed25519", parameters={"kid": "ed"}),
}
STRANGER = RSAKey.generate_key(2048, parameters={"kid": "rsa"})
PUBLIC = json.dumps(KeySet(list(KEYS.values())).as_dict(private=False)).encode()
PROVIDER = Provider(issuer="https://id.example.org", audience="discreet", claim="groups", keys="jwks.json")


def claims(**changes) -> dict:
    now = int(time.time())
    found = {"iss": PROVIDER.issuer, "aud": PROVIDER.audience, "exp": now + 300, "iat": now, "sub": "u", "groups": ["ward", "staff"], **changes}
    return {name: value for name, value in found.items() if value is not None}


def token(algorithm: str = "RS256", key=None, header: dict | None = None, **changes) -> str:
    head = {"alg": algorithm, "kid": (key or KEYS[algorithm]).kid, **(header or {})}
    return jwt.encode(
        {name: value for name, value in head.items() if value is not None}, claims(**changes), key or KEYS[algorithm], algorithms=[algorithm]
    )


def forged(header: dict, signature: str = "AA") -> str:
    parts = (base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, claims()))
    return f"{'.'.join(parts)}.{signature}"


def values(given: str, content: bytes = PUBLIC, **changes) -> frozenset[str]:
    async def load() -> bytes:
        return content

    async def ask() -> frozenset[str]:
        verifier = Verifier(provider=Provider(**{**{n: getattr(PROVIDER, n) for n in ("issuer", "audience", "claim", "keys")}, **changes}), load=load)
        await verifier.open()
        return await verifier.values(given)

    return asyncio.run(ask())


@pytest.mark.parametrize("algorithm", sorted(KEYS))
def test_a_token_of_the_provider_gives_the_values_of_its_claim(algorithm):
    assert values(token(algorithm)) == {"ward", "staff"}
    assert values(token(algorithm, groups="ward")) == {"ward"}
    assert values(token(algorithm, groups=[1, None])) == frozenset()


@pytest.mark.parametrize(
    "changes",
    [{"iss": None}, {"iss": "https://other.example"}, {"aud": None}, {"aud": "another"}, {"exp": None}, {"exp": 1}, {"exp": "soon"}, {"nbf": 2**40}],
)
def test_issuer_audience_and_expiry_must_be_there_and_right(changes):
    with pytest.raises(AccessDenied):
        values(token(**changes))


@pytest.mark.parametrize(
    "header", [{"alg": "none"}, {"alg": "None"}, {"alg": "none", "kid": "rsa"}, {"alg": "HS256", "kid": "rsa"}, {"alg": ["RS256"], "kid": "rsa"}, {}]
)
@pytest.mark.parametrize("signature", ["AA", "e30"])
def test_no_algorithm_and_confused_ones_are_refused(header, signature):
    with pytest.raises(AccessDenied):
        values(forged(header, signature))


def test_an_hmac_under_the_public_key_is_no_signature():
    for material in (KEYS["RS256"].as_pem(private=False), PUBLIC):
        for algorithm in ("HS256", "RS256"):
            signed = forged({"alg": algorithm, "kid": "rsa"}, "").rstrip(".")
            mac = base64.urlsafe_b64encode(hmac.digest(material, signed.encode(), "sha256")).decode().rstrip("=")
            with pytest.raises(AccessDenied):
                values(f"{signed}.{mac}")


@pytest.mark.parametrize("key_id", ["../../etc/passwd", "/dev/null", "https://evil.example/jwks", "' OR 1=1 --", "nobody", "", 7, None, ["rsa"]])
def test_a_key_id_is_looked_up_by_equality_alone(key_id):
    with pytest.raises(AccessDenied):
        values(forged({"alg": "RS256", "kid": key_id}))


@pytest.mark.parametrize(
    "header", [{"jwk": {}}, {"jku": "https://evil.example"}, {"x5u": "https://evil.example"}, {"x5c": ["AA"]}, {"crit": ["exp"]}, {"b64": False}]
)
def test_headers_that_bring_a_key_or_ask_for_more_are_refused(header):
    with pytest.raises(AccessDenied):
        values(forged({"alg": "RS256", "kid": "rsa", **header}))


def test_a_stranger_a_changed_token_and_a_key_of_another_type_are_refused():
    good = token()
    head, body, signature = good.split(".")
    for bad in (
        token("RS256", STRANGER),
        f"{head}.{body}x.{signature}",
        f"{head}.{body}.{signature[:-4]}AAAA",
        good + "x" * 9000,
        "a.b.c",
        "a.b",
        "é.b.c",
    ):
        with pytest.raises(AccessDenied) as refused:
            values(bad)
        assert "ward" not in str(refused.value)
    with pytest.raises(AccessDenied):
        values(token("ES256", header={"kid": "rsa"}))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"keys": []}', b'{"keys": [{"kty": "oct", "kid": "rsa", "k": "AA"}]}', b'{"keys": [{"kty": "RSA"}]}', b"x" * 1_000_001]
)
def test_key_sets_without_public_keys_are_refused(content):
    with pytest.raises(ConfigInvalid):
        parse_keys(content)


def test_a_new_key_is_loaded_at_most_once_in_a_while(monkeypatch):
    loaded: list[int] = []
    new = RSAKey.generate_key(2048, parameters={"kid": "new"})

    async def load() -> bytes:
        loaded.append(1)
        return PUBLIC if len(loaded) == 1 else json.dumps(KeySet([new]).as_dict(private=False)).encode()

    async def ask() -> None:
        verifier = Verifier(provider=PROVIDER, load=load)
        await verifier.open()
        for _ in range(3):
            with pytest.raises(AccessDenied):
                await verifier.values(token("RS256", new))
        monkeypatch.setattr(oidc, "RELOAD_S", -1.0)
        assert await verifier.values(token("RS256", new)) == {"ward", "staff"}

    asyncio.run(ask())
    assert len(loaded) == 2


def test_a_provider_that_is_down_is_not_asked_by_every_token():
    tries: list[int] = []

    async def load() -> bytes:
        tries.append(1)
        raise UpstreamFailed("a key set")

    async def ask() -> None:
        verifier = Verifier(provider=PROVIDER, load=load)
        for expected in (UpstreamFailed, AccessDenied, AccessDenied):
            with pytest.raises(expected):
                await verifier.values(token())

    asyncio.run(ask())
    assert len(tries) == 1


def test_keys_and_tokens_are_told_apart():
    assert looks_like_token(token())
    assert not looks_like_token("dk-abc")
    assert not looks_like_token("sk-abc")


@pytest.mark.parametrize(("status", "content"), [(200, b"ok"), (302, b""), (404, b"no"), (200, b"x" * 11)])
def test_a_key_set_is_fetched_as_the_upstream_is(monkeypatch, status, content):
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((str(request.url), request.headers["host"]))
        return httpx.Response(status, content=content, headers={"location": "http://169.254.169.254/"})

    monkeypatch.setattr(upstream.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("93.184.216.34", 443))])
    fetching = upstream.fetch("https://id.example.org/jwks", max_bytes=10, transport=httpx.MockTransport(answer))
    if (status, content) == (200, b"ok"):
        assert asyncio.run(fetching) == b"ok"
    else:
        with pytest.raises(UpstreamFailed):
            asyncio.run(fetching)
    assert seen == [("https://93.184.216.34/jwks", "id.example.org")]


def test_a_key_set_at_a_private_address_is_refused(monkeypatch):
    monkeypatch.setattr(upstream.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("10.0.0.1", 443))])
    with pytest.raises(ConfigInvalid):
        asyncio.run(upstream.fetch("https://id.example.org/jwks", max_bytes=10))
