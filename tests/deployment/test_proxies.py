"""Proxies of the environment, as Flower's HTTP library reads them."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator

import httpx
import pytest

from fedara_flwr.cli import habits
from fedara_flwr.cli.deploy import network
from fedara_flwr.cli.proxies import LOCAL_HOSTS, passed_by, unusable, without_proxy


@pytest.fixture(autouse=True)
def no_words(monkeypatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    yield


def test_calls_to_this_machine_pass_by_a_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "example.org")
    assert without_proxy() == {"no_proxy": f"example.org,{LOCAL_HOSTS}", "NO_PROXY": LOCAL_HOSTS}
    monkeypatch.setenv("no_proxy", without_proxy()["no_proxy"])
    assert urllib.request.proxy_bypass_environment("127.0.0.1") and not urllib.request.proxy_bypass_environment("a.net")


@pytest.mark.parametrize(
    "name, value, why",
    [
        ("ALL_PROXY", "socks://127.0.0.1:1080", "Unknown scheme"),
        ("https_proxy", "http://proxy:port", "Invalid port"),
        ("no_proxy", "example.org,::1/128", "httpx cannot read '::1/128'"),
        ("NO_PROXY", "[::1], fe80::/10", "httpx cannot read '[::1]', 'fe80::/10'"),
    ],
)
def test_words_at_which_every_process_of_flower_ends(monkeypatch, name, value, why):
    """A client of httpx cannot be made at all, whatever it is to reach; what has no fault stays."""
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    assert not unusable() and habits.proxies().level == network.proxies().level == "ok"
    monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, httpx.InvalidURL)):
        httpx.Client()
    assert list(unusable()) == [name] and why in unusable()[name]
    assert habits.proxies().level == "warning" and network.proxies().level == "problem" and name in network.proxies().found
    for key, word in without_proxy().items():
        monkeypatch.setenv(key, word)
    httpx.Client().close()
    assert not unusable() and "http" in urllib.request.getproxies()


@pytest.mark.parametrize(
    "host, past",
    [
        *(
            ("a.org", past)
            for past in ("*", "b,*", "a.org", ".a.org", "A.ORG", " a.org ", "a.org:8000", "a.org:1", "org", "x.a.org")
        ),
        *(("a.org", past) for past in ("", "http://a.org", "https://a.org:8000", "a.org b.org", "*.a.org")),
        *(("x.a.org", past) for past in ("a.org", ".a.org", "*.a.org", "ba.org")),
        *(("10.1.1.1", past) for past in ("10.1.1.1", "10.0.0.0/8", "10.*", "1.1", ".1")),
        *(("fd00::7", past) for past in ("fd00::7", "fd00::8", "::7")),
    ],
)
def test_a_host_is_passed_by_as_httpx_does(monkeypatch, host, past):
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", past)
    with httpx.Client() as client:
        url = httpx.URL(f"https://[{host}]:8000" if ":" in host else f"https://{host}:8000")
        direct = client._transport_for_url(url) is client._transport
    assert passed_by(host, 8000, past) is direct
