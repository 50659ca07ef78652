"""Standard output that cannot be written: one line, and no second failure at exit."""

import errno
import os
import signal
import subprocess
import sys

import pytest

COMMANDS = {
    "fipo": "import fipo.cache, fipo.cli as c; fipo.cache.run = lambda _: {work}; sys.exit(c.main(['cache']))",
    "experiment": "import experiment as e, fipo.job; fipo.job.run = lambda *_: {work}; "
    "sys.argv = ['e', '--out_dir', 'run_0']; sys.exit(e.main())",
}


def run(command, work, stdout):
    code = f"import sys; {COMMANDS[command].format(work=work)}"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, env=buffered)
    return done.returncode, done.stderr.decode()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("work", ["print('short')", "print('long' * 100_000)"])
def test_a_full_disk(command, work):
    with open("/dev/full", "w") as full:
        code, told = run(command, work, full)
    assert code == 2
    assert told == f"error: the standard output cannot be written: {os.strerror(errno.ENOSPC)}; free space there\n"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("work", ["print('short')", "print('long' * 100_000)"])
def test_nobody_reads_any_more(command, work):
    read, write = os.pipe()
    os.close(read)
    code, told = run(command, work, write)
    os.close(write)
    assert (code, told) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_on_a_full_disk_is_no_output(command):
    work = f"(_ for _ in ()).throw(OSError({errno.ENOSPC}, 'full', '/some/file'))"
    code, told = run(command, work, subprocess.PIPE)
    assert code == 1 and "Traceback" in told and "/some/file" in told
