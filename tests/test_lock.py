"""fipo.lock: one process at a time, no longer than it lives, and no file left behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fipo import lock
from fipo.errors import UserError
from fipo.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from fipo.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_is_told_and_the_kernel_lets_go_of_a_killed_one(tmp_path, holder):
    refused = pytest.raises(UserError, match="another process is working in .*; wait until it ends, or choose another")
    with refused, locked(tmp_path / ".lock"):
        pytest.fail("two processes in one folder")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path / ".lock"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_who_waits_gets_it_afterwards(tmp_path, capsys):
    order = []

    def second():
        with locked(tmp_path / ".lock", wait=True):
            order.append("second")

    with locked(tmp_path / ".lock"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"] and list(tmp_path.iterdir()) == []
    assert "waiting for another process" in capsys.readouterr().err


def test_never_two_at_a_time(tmp_path):
    """Files come and go under the same name; whoever got an old one tries again."""
    inside, most = [], []

    def work():
        for _ in range(50):
            with locked(tmp_path / ".lock", wait=True):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert max(most) == 1 and len(most) == 200 and list(tmp_path.iterdir()) == []


def test_a_link_in_its_place_is_refused(tmp_path):
    (tmp_path / "precious").write_text("content")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot write .*lock"), locked(tmp_path / ".lock"):
        pass
    assert (tmp_path / "precious").read_text() == "content" and os.path.islink(tmp_path / ".lock")


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path, monkeypatch):
    """Its holder removed it between our opening and our lock: the file of that name now is another one."""
    original, calls = lock._lock, []

    def late(opened, path, wait):
        if not calls:
            path.unlink()
        calls.append(opened)
        original(opened, path, wait)

    monkeypatch.setattr(lock, "_lock", late)
    with locked(tmp_path / ".lock"):
        assert (tmp_path / ".lock").exists() and len(calls) == 2
