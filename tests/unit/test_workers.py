"""The threads beside the event loop: there from the start, and never more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvd.workers import THREADS, ready_executor


def test_all_threads_run_before_the_first_task_and_none_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    with ready_executor() as executor:
        started = set(threading.enumerate()) - before
        assert len(started) == THREADS

        def refuse(thread: threading.Thread) -> None:
            raise AssertionError("a thread was started for a task")

        async def work() -> list[threading.Thread]:
            asyncio.get_running_loop().set_default_executor(executor)
            return await asyncio.gather(*(asyncio.to_thread(threading.current_thread) for _ in range(5 * THREADS)))

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            runner = asyncio.new_event_loop()
            try:
                assert set(runner.run_until_complete(work())) <= started
            finally:
                runner.close()


def test_as_many_tasks_as_threads_run_at_the_same_time() -> None:
    with ready_executor() as executor:
        together = threading.Barrier(THREADS, timeout=20)
        assert sorted(executor.map(lambda _: together.wait(), range(THREADS))) == list(range(THREADS))
