"""A program at a real terminal: what is typed, and what is seen."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[=>])")


class Terminal:
    """Of a process in a session of its own, as a terminal's window starts it."""

    def __init__(self, command, *, environment=None, columns=100, lines=30):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""
        """All output so far, without colours and cursor movements."""
        self._raw = b""
        self._told = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)

    def type(self, text):
        os.write(self.master, text.encode())

    def expect(self, pattern, seconds=90):
        """Wait until the pattern is behind all that was expected before; returns what stands up to its end."""
        until = time.monotonic() + seconds
        while not (found := re.compile(pattern, re.DOTALL).search(self.seen, self._told)):
            assert time.monotonic() < until, f"waited for {pattern!r}, saw {self.seen[self._told :]!r}"
            assert self._read(), f"ended before {pattern!r}, saw {self.seen[self._told :]!r}"
        text = self.seen[self._told : found.end()]
        self._told = found.end()
        return text

    def ended(self, seconds=60):
        """The exit code."""
        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until:
            self._read()
        return self.process.wait(1)

    def _read(self):
        """False when nobody writes any more."""
        if not select.select([self.master], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:  # how a terminal says that its last writer is gone
            return False
        self._raw += data
        self.seen = ESCAPES.sub("", self._raw.decode(errors="ignore")).replace("\r", "")
        return bool(data)
