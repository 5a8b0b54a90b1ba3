"""--record-trace: what is written down, what is not, and that nobody waits for it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from kvd.recorder import Recorder
from kvd.replay import trace as trace_reader
from kvd.types import Namespace
from kvd.wire.identity import Identity
from tests.wait import wait_until

IDENTITY = Identity(model="m", weights_revision="1", block_tokens=16, chunk_blocks=16)
NAMESPACE = Namespace(b"n" * 32, "default", IDENTITY, 1 << 20)
OTHER = Namespace(b"o" * 32, "default", IDENTITY, 1 << 20)


def keys(*names: str) -> list[bytes]:
    return [hashlib.sha256(name.encode()).digest() for name in names]


class Clock:
    """Time that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recorder(tmp_path: Path, clock: Clock) -> Iterator[Recorder]:
    recorder = Recorder(str(tmp_path / "trace.jsonl"), clock=clock)
    recorder.start()
    yield recorder
    recorder.close()


def lines(recorder: Recorder) -> list[dict[str, Any]]:
    """All that was recorded; ends the recorder."""
    recorder.close()
    return [json.loads(line) for line in Path(recorder.path).read_text().splitlines()]


def test_a_request_is_a_line_that_says_when_how_long_and_which_prefix(recorder: Recorder, clock: Clock) -> None:
    recorder.asked(7, NAMESPACE, keys("a", "b", "c"))
    clock.now += 1.5
    recorder.asked(8, NAMESPACE, keys("a", "b", "x", "y"))
    first, second = lines(recorder)
    assert (first["timestamp"], second["timestamp"]) == (0, 1500)
    assert (first["input_length"], second["input_length"]) == (3 * 256, 4 * 256)
    assert first["output_length"] == 0
    assert (first["session_id"], second["session_id"]) == ("7", "8")
    assert (first["block_tokens"], first["block_bytes"]) == (256, 1 << 20)
    assert first["hash_ids"][:2] == second["hash_ids"][:2]
    assert len({*first["hash_ids"], *second["hash_ids"]}) == 5
    assert recorder.totals() == {"recorded": 2, "dropped": 0}


def test_a_number_stands_for_the_whole_prefix_and_the_namespace(recorder: Recorder) -> None:
    recorder.asked(1, NAMESPACE, keys("a", "b"))
    recorder.asked(1, NAMESPACE, keys("x", "b"))
    recorder.asked(1, OTHER, keys("a", "b"))
    numbers = [number for line in lines(recorder) for number in line["hash_ids"]]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 << 53 for number in numbers)


def test_the_numbers_of_two_files_have_nothing_in_common(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        recorder = Recorder(str(tmp_path / name))
        recorder.start()
        recorder.asked(1, NAMESPACE, keys("a", "b"))
        found.append(lines(recorder)[0]["hash_ids"])
    assert not set(found[0]) & set(found[1])


def test_the_file_holds_no_key_and_is_for_this_user_alone(recorder: Recorder) -> None:
    recorder.asked(1, NAMESPACE, keys("a"))
    recorder.close()
    text = Path(recorder.path).read_text()
    assert keys("a")[0].hex() not in text
    assert NAMESPACE.id.hex() not in text
    assert stat.S_IMODE(os.stat(recorder.path).st_mode) == 0o600


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("another life's\n")
    (tmp_path / "trace.jsonl.1").symlink_to("/nowhere")
    recorder = Recorder(str(path))
    assert recorder.path == f"{path}.2"
    recorder.close()
    assert path.read_text() == "another life's\n"


def test_a_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Recorder(str(tmp_path / "gone" / "trace.jsonl"))


def test_what_is_asked_can_be_read_while_the_daemon_goes_on(recorder: Recorder) -> None:
    recorder.asked(1, NAMESPACE, keys("a"))
    wait_until(lambda: Path(recorder.path).read_text().endswith("\n"), what="the line")
    recorder.asked(1, NAMESPACE, [])
    assert len(lines(recorder)) == 1


def test_more_than_may_wait_is_left_out_and_counted(tmp_path: Path) -> None:
    recorder = Recorder(str(tmp_path / "trace.jsonl"), max_queued_keys=4)
    for _ in range(3):  # the thread has not begun: all of it waits
        recorder.asked(1, NAMESPACE, keys("a", "b"))
    recorder.start()
    assert len(lines(recorder)) == 2
    assert recorder.totals() == {"recorded": 2, "dropped": 1}


def test_a_full_file_ends_with_a_whole_line_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(str(tmp_path / "trace.jsonl"), max_file_bytes=400)
    recorder.start()
    for number in range(10):
        recorder.asked(1, NAMESPACE, keys(str(number)))
    written = lines(recorder)
    assert 1 <= len(written) <= 3
    assert os.path.getsize(recorder.path) <= 400
    assert caplog.text.count("goes on without recording") == 1
    recorder.asked(1, NAMESPACE, keys("late"))
    assert recorder.totals() == {"recorded": len(written), "dropped": 11 - len(written)}


def test_a_disk_that_is_full_ends_the_recording_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder.__new__(Recorder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvd.recorder._new_file", lambda path: (path, FileIO("/dev/full", "wb")))
        recorder.__init__("/dev/full")  # type: ignore[misc]
    recorder.start()
    recorder.asked(1, NAMESPACE, keys("a"))
    wait_until(lambda: "No space left" in caplog.text, what="the word about it")
    recorder.asked(1, NAMESPACE, keys("b"))
    recorder.close()
    assert recorder.totals() == {"recorded": 0, "dropped": 2}
    assert not [thread for thread in threading.enumerate() if thread.name == "kvd-recorder"]


def test_a_recorded_file_is_read_by_the_replay(recorder: Recorder, clock: Clock) -> None:
    recorder.asked(1, NAMESPACE, keys("a", "b", "c"))
    clock.now += 2
    recorder.asked(2, NAMESPACE, keys("a", "b", "x"))
    recorder.asked(1, OTHER, keys("a"))
    recorder.close()
    trace = trace_reader.read(recorder.path, lambda share: None)
    assert trace.block_tokens == 256
    found = [(time, list(blocks), tail) for time, blocks, tail in trace.requests()]
    assert found == [(0.0, [0, 1, 2], False), (2.0, [0, 1, 3], False), (2.0, [4], False)]
    assert list(trace.parents) == [-1, 0, 1, 1, -1]


def test_many_keys_keep_their_order(recorder: Recorder) -> None:
    many = keys(*(str(number) for number in range(300)))
    recorder.asked(1, NAMESPACE, many)
    recorder.asked(1, NAMESPACE, many[:150])
    whole, half = lines(recorder)
    assert whole["hash_ids"][:150] == half["hash_ids"]
    assert len(set(whole["hash_ids"])) == 300
