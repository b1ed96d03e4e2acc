"""The one server: checked when it is named, never followed elsewhere."""

from __future__ import annotations

import asyncio
import gzip
import socket

import httpx
import pytest

from discreet.errors import ConfigInvalid, Overloaded, RequestInvalid, UpstreamFailed
from discreet.serve import upstream
from discreet.serve.upstream import Address, Upstream, resolve

ADDRESS = Address(base="https://203.0.113.9:443", host="api.test", authority="api.test")


def names(monkeypatch, *addresses: str) -> list[str]:
    asked: list[str] = []

    def look_up(host, port, **_):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "192.168.0.1",
        "0.0.0.0",
        "::1",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:10.0.0.1",
        "100.64.0.1",
        "224.0.0.1",
    ],
)
def test_addresses_that_are_not_global_are_denied_unless_listed(monkeypatch, address):
    names(monkeypatch, "93.184.216.34", address)
    with pytest.raises(ConfigInvalid, match="--allow-private"):
        resolve("https://api.test")
    assert resolve("http://api.test/v1", private=frozenset(("api.test",))).base == "http://93.184.216.34:80"


def test_the_checked_address_is_the_one_that_is_called(monkeypatch):
    asked = names(monkeypatch, "93.184.216.34")
    found = resolve("https://api.test:8443/openai/v1/")
    assert (found.base, found.authority) == ("https://93.184.216.34:8443/openai", "api.test:8443")
    seen: list[httpx.Request] = []
    client = Upstream(
        address=found, api_key="k", transport=httpx.MockTransport(lambda request: seen.append(request) or httpx.Response(200, json={"ok": 1}))
    )
    assert asyncio.run(_ask(client)) == {"ok": 1}
    assert seen[0].url == "https://93.184.216.34:8443/openai/v1/chat/completions"
    assert seen[0].headers["host"] == "api.test:8443"
    assert seen[0].extensions["sni_hostname"] == "api.test"  # certificates are verified against the name
    assert asked == ["api.test"]


async def _ask(client: Upstream, path: str = upstream.CHAT):
    await client.open()
    try:
        return await client.ask(path, {})
    finally:
        await client.close()


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://api.test", "https://", "https://u:p@api.test", "https://api.test?x=1", "https://api.test:99999", "api.test"]
)
def test_other_urls_are_refused(monkeypatch, url):
    names(monkeypatch, "93.184.216.34")
    with pytest.raises(ConfigInvalid):
        resolve(url)


def test_a_name_that_does_not_resolve(monkeypatch):
    def fails(*_, **__):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    with pytest.raises(UpstreamFailed):
        resolve("https://api.test")


@pytest.mark.parametrize(
    ("status", "kind"), [(301, UpstreamFailed), (403, UpstreamFailed), (503, UpstreamFailed), (400, RequestInvalid), (429, Overloaded)]
)
def test_statuses(status, kind):
    client = Upstream(
        address=ADDRESS, transport=httpx.MockTransport(lambda _: httpx.Response(status, headers={"location": "http://10.0.0.1"}, text="secret words"))
    )
    with pytest.raises(kind) as error:
        asyncio.run(_ask(client))
    assert "secret" not in str(error.value)


def test_a_dead_server_an_endless_answer_and_an_unknown_path():
    def dies(_):
        raise httpx.ConnectError("secret words")

    for transport, path in (
        (dies, upstream.CHAT),
        (lambda _: httpx.Response(200, content=b"x" * 100), upstream.CHAT),
        (lambda _: httpx.Response(200), "/pause"),
    ):
        client = Upstream(address=ADDRESS, transport=httpx.MockTransport(transport), max_answer_bytes=10)
        with pytest.raises(UpstreamFailed) as error:
            asyncio.run(_ask(client, path))
        assert "secret" not in str(error.value)


def test_an_answer_keeps_the_size_that_it_began_with():
    async def ask() -> bytes:
        client = Upstream(address=ADDRESS, transport=httpx.MockTransport(lambda _: httpx.Response(200, content=b"x" * 10)), max_answer_bytes=10)
        await client.open()
        async with client.stream(upstream.CHAT, {}) as chunks:
            client.max_answer_bytes = 1
            return b"".join([chunk async for chunk in chunks])

    assert asyncio.run(ask()) == b"x" * 10


def test_a_compressed_answer_is_refused_unread():
    bomb = gzip.compress(bytes(10_000_000))

    async def ask():
        client = Upstream(
            address=ADDRESS, transport=httpx.MockTransport(lambda _: httpx.Response(200, headers={"content-encoding": "gzip"}, content=bomb))
        )
        await client.open()
        await client.ask(upstream.CHAT, {})

    with pytest.raises(UpstreamFailed, match="not compressed"):
        asyncio.run(ask())


def test_the_key_is_in_no_representation():
    assert "topsecret" not in repr(Upstream(address=ADDRESS, api_key="topsecret"))
