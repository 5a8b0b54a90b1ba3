"""How long a wait for chunks lasts: always bounded, over when nothing comes, with ever rarer questions."""

from __future__ import annotations

from kvd_client.patience import ASK_MAX_S, ASK_MIN_S, Patience


def test_a_wait_is_over_when_nothing_is_on_its_way() -> None:
    patience = Patience(10.0, timeout_s=1.0)
    assert patience.heard(10.0, 0, 3)
    assert not patience.heard(10.1, 3, 0)
    assert not patience.heard(10.2, 3, 5)  # and stays over


def test_a_wait_never_outlasts_its_deadline_whatever_arrives() -> None:
    patience, now, answers = Patience(0.0, timeout_s=1.0, stall_s=0.5), 0.0, 0
    while patience.heard(now, answers, 1000):
        answers += 1
        assert now < patience.ask_at <= patience.deadline == 1.0
        now = patience.ask_at
    assert now == 1.0


def test_a_wait_without_time_is_over_at_once() -> None:
    assert not Patience(5.0, timeout_s=0.0).heard(5.0, 0, 10)


def test_a_wait_ends_early_when_nothing_moves() -> None:
    patience = Patience(0.0, timeout_s=1.0, stall_s=0.25)
    assert patience.heard(0.0, 0, 10)
    assert patience.heard(0.2, 1, 9)  # one has arrived
    assert patience.heard(0.4, 1, 8)  # one was given up by the daemon: the rest may still come
    assert patience.heard(0.6, 1, 12)  # more on their way are no progress
    assert not patience.heard(0.66, 1, 8)


def test_questions_come_at_once_at_first_and_rarely_later() -> None:
    patience = Patience(0.0, timeout_s=60.0)
    patience.heard(0.0, 0, 1)
    assert patience.ask_at == ASK_MIN_S
    patience.heard(0.1, 0, 1)
    assert patience.ask_at == 0.125
    patience.heard(30.0, 0, 1)
    assert patience.ask_at == 30.0 + ASK_MAX_S
