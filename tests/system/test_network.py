"""A server that does not answer is found out at once."""

from __future__ import annotations

import socket

import pytest

from usllm.system.errors import RunError
from usllm.system.network import network_or_user_error, unreachable


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_server_that_listens_is_reachable_and_one_that_has_gone_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert unreachable(address) is None
    assert "refused" in str(unreachable(address))


def test_what_only_a_proxy_reaches_is_left_to_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    assert unreachable("https://no.such.host.invalid") is None


def test_network_is_a_failure_on_the_way_and_a_name_that_is_not_there_a_wrong_input() -> None:
    assert network_or_user_error("a", OSError("We couldn't connect to the hub")).status == RunError.status
    assert network_or_user_error("a", OSError("no/such is not a valid model identifier")).status == 2
