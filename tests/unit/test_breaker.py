"""The circuit breaker."""

from __future__ import annotations

import pytest

from kvd.wire.errors import Unavailable
from kvd_client.breaker import Breaker


def test_a_closed_breaker_lets_calls_through() -> None:
    breaker = Breaker(lambda: None)
    breaker.check()
    assert not breaker.is_open
    assert breaker.opened == 0


def test_the_first_failure_opens_it_and_wakes_the_prober_once() -> None:
    woken = []
    breaker = Breaker(lambda: woken.append(True))
    breaker.open("deadline exceeded")
    breaker.open("again")
    assert breaker.is_open
    assert breaker.opened == 1
    assert woken == [True]
    with pytest.raises(Unavailable, match="again"):
        breaker.check()


def test_a_failure_without_a_reason_opens_it_too() -> None:
    breaker = Breaker(lambda: None)
    breaker.open("")
    assert breaker.is_open


def test_it_closes_when_the_daemon_has_answered_and_can_open_again() -> None:
    breaker = Breaker(lambda: None)
    breaker.open("gone")
    breaker.close()
    breaker.check()
    breaker.open("gone again")
    assert breaker.opened == 2
