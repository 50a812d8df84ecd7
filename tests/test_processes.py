"""Child processes: run with a log, ended with us, by an error beside them, and when they do not listen."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from llava_clipmoe import processes
from llava_clipmoe.processes import Children, end_of, exit_on_sigterm

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_until_up(log: Path) -> None:
    end = time.monotonic() + 60
    while not (log.exists() and "up" in log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_output_goes_into_the_log_and_the_status_is_told(tmp_path):
    children, log = Children(), tmp_path / "log"
    for status in (0, 3):
        code = f"import sys; print({status}, file=sys.stderr); sys.exit({status})"
        assert children.run(python(code), log=log) == status
    assert log.read_text().split() == ["0", "3"]


@pytest.mark.parametrize("code", [SLEEP, STUBBORN])
def test_stop_ends_what_runs_and_nothing_starts_afterwards(tmp_path, monkeypatch, code):
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    children, log, statuses = Children(), tmp_path / "log", []
    thread = threading.Thread(target=lambda: statuses.append(children.run(python(code), log=log)))
    thread.start()
    wait_until_up(log)
    children.stop()
    thread.join(30)
    assert statuses == [None]
    assert children.run(python("open('started', 'w')"), log=log) is None


def test_an_error_ends_the_others_and_is_raised(tmp_path):
    children, log, statuses = Children(), tmp_path / "log", []

    def fail() -> None:
        wait_until_up(log)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        children.run_all([lambda: statuses.append(children.run(python(SLEEP), log=log)), fail])
    assert statuses == [None], "the child ended by itself"


def test_results_come_in_the_order_of_the_works():
    children = Children()
    codes = [python(f"import time; time.sleep({pause}); raise SystemExit({n})") for n, pause in ((1, 0.3), (2, 0))]
    assert children.run_all([lambda code=code: children.run(code) for code in codes]) == [1, 2]


def test_sigterm_exits_in_the_main_thread_and_changes_nothing_elsewhere():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, exit_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    entered = []

    def elsewhere() -> None:
        with exit_on_sigterm():
            entered.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert entered == [True]


def test_the_end_of_a_log_has_progress_bars_line_by_line(tmp_path):
    (tmp_path / "log").write_bytes(b"one\ntwo\r 10%\r 20%\xff\n")
    assert end_of(tmp_path / "log", lines=2) == " 10%\n 20%\ufffd"
