"""Programs that a sandbox must contain, each so that it ends well only if it got what it wanted; and how they ended.

As a script: runs them all in the walls that are named first, prints {name: reason, None if it ended well}.
"""

import ctypes
import json
import os
import subprocess
import sys
import time

SUBREAPER = 36
OUTSIDE = r"PermissionError|FileNotFoundError|OSError"

# name: (what it does, how that must end); HOME, TREE (a file) and PID (the runner's) stand for themselves
PROGRAMS: dict[str, tuple[str, str]] = {
    "socket": ("import socket; socket.socket()", "PermissionError"),
    "unix socket": ("import socket; socket.socketpair()", "PermissionError"),
    "web": ("import urllib.request as r; r.urlopen('http://127.0.0.1:80')", "URLError|PermissionError"),
    "dns": ("import socket; socket.getaddrinfo('example.org', 80)", "gaierror|PermissionError"),
    "socket of libc": ("import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) >= 0", "AssertionError"),
    "shadow": ("open('/etc/shadow').read()", OUTSIDE),
    "passwd": ("open('/etc/passwd').read()", OUTSIDE),
    "home": ("open('HOME/secret').read()", OUTSIDE),
    "list of home": ("import os; os.listdir('HOME')", OUTSIDE),
    "working tree": ("open('TREE').read()", OUTSIDE),
    "environment": ("import os; assert 'hidden' in str(os.environ)", "AssertionError"),
    "environment of the runner": ("open('/proc/PID/environ', 'rb').read()", OUTSIDE),
    "environment of the first": ("open('/proc/1/environ', 'rb').read()", OUTSIDE),
    "own memory": ("open('/proc/self/mem', 'r+b')", OUTSIDE),
    "symlink": ("import os; os.symlink('HOME/secret', 'link'); open('link').read()", OUTSIDE),
    "hard link": ("import os; os.link('HOME/secret', 'link')", OUTSIDE),
    "up": ("open('../' * 20 + 'HOME/secret').read()", OUTSIDE),
    "chroot": ("import os; os.chroot('.')", OUTSIDE),
    "write home": ("open('HOME/written', 'w').write('x')", OUTSIDE),
    "write shared memory": ("open('/dev/shm/written', 'w').write('x')", OUTSIDE),
    "write root": ("open('/written', 'w').write('x')", OUTSIDE),
    "write library": ("import os; open(os.__file__, 'a').write('x')", OUTSIDE),
    "remove library": ("import os; os.remove(os.__file__)", OUTSIDE),
    "chmod": ("import os; os.chmod(os.__file__, 0o777)", OUTSIDE),
    "truncate": ("import os; os.truncate('HOME/secret', 0)", OUTSIDE),
    "device": ("import os, stat; os.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(8, 0))", OUTSIDE),
    "anonymous memory file": ("import os; os.memfd_create('x')", "PermissionError"),
    "fill the disk": ("for i in range(10**6): open(f'{i}', 'wb').write(bytes(10**6))", OUTSIDE),
    "many files": ("for i in range(10**6): open(f'{i}', 'w').close()", OUTSIDE),
    "large file": ("open('f', 'wb').truncate(10**12)", OUTSIDE),
    "fork bomb": ("import os\nwhile True: os.fork()", "PermissionError"),
    "daemon": ("import os, time\nif not os.fork():\n    os.setsid(); time.sleep(1000)", "PermissionError"),
    "threads": ("import threading as t\nwhile True: t.Thread(target=input).start()", "can't start new thread"),
    "shell": ("import os; assert os.system('touch HOME/written') == 0", "AssertionError|PermissionError"),
    "subprocess": ("import subprocess; subprocess.run(['/bin/sh', '-c', 'id'])", "Error"),
    "spawn": ("import os; os.posix_spawn('/bin/sh', ['sh'], {})", OUTSIDE),
    "exec": ("import os, sys; os.execv(sys.executable, ['python', '-c', ''])", OUTSIDE),
    "kill the runner": ("import os; os.kill(PID, 9)", OUTSIDE),
    "kill all": ("import os; os.kill(-1, 9)", OUTSIDE),
    "signal by file": (
        "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, PID)",
        "PermissionError",
    ),
    "handle of the runner": ("import os; os.pidfd_open(PID)", OUTSIDE),
    "ptrace": ("import ctypes; assert ctypes.CDLL(None).ptrace(16, PID, 0, 0) == 0", "AssertionError"),
    "slow the runner": ("import os; os.setpriority(os.PRIO_PROCESS, PID, 10)", OUTSIDE),
    "limits of the runner": ("import resource; resource.prlimit(PID, resource.RLIMIT_CPU, (1, 1))", OUTSIDE),
    "own limits": ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "ValueError|PermissionError"),
    "root": ("import os; os.setuid(0)", OUTSIDE),
    "groups": ("import os; os.setgroups([0])", OUTSIDE),
    "mount": ("import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0", "AssertionError"),
    "namespaces": ("import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0", "AssertionError"),
    "loop": ("while True: pass", "timeout"),
    "sleep": ("import time; time.sleep(1000)", "timeout"),
    "deaf": (
        "import signal\nfor s in {*signal.Signals} - {9, 19}: signal.signal(s, lambda *a: None)\nwhile True: pass",
        "timeout",
    ),
    "slow pattern": ("import re; re.match('(a+)+$', 'a' * 40 + 'b')", "timeout"),
    "much text": ("while True: print('x' * 10**6)", "timeout"),
    "memory": ("x = [bytes(10**8) for _ in range(1000)]", "MemoryError"),
    "crash": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "depth": ("import sys; sys.setrecursionlimit(10**9)\nf = lambda: f()\nf()", "SIGSEGV|MemoryError|timeout"),
    "leave at once": ("import os; os._exit(0)", "ended before"),
    "exit": ("import sys; sys.exit(0)", "SystemExit"),
    "quit": ("raise SystemExit", "SystemExit"),
    "say so": ("print('passed'); assert False", "AssertionError"),
    "say so at the end": ("import atexit; atexit.register(print, 'passed')\nraise ValueError('no')", "ValueError: no"),
    "say so everywhere": (
        "import os\nfor f in range(3, 64):\n    try: os.write(f, b'passed')\n    except OSError: pass\nos._exit(0)",
        "passed",
    ),
    "close everything": ("import os; os.closerange(0, 64)", "ended before"),
    "words that leave": (
        "import os\nclass E(Exception):\n    def __str__(self): os._exit(0)\nraise E",
        "ended before",
    ),
    "words that hurt": ("class E(Exception):\n    def __str__(self): raise self\nraise E", "^E$"),
    "control characters": ("raise ValueError('\\x1b[2J\\n<script>')", r"^ValueError: \[2J <script>$"),
    "look for the nonce": (
        "import re, sys\nframe, seen = sys._getframe(), ''\nwhile frame:\n"
        "    seen += repr(frame.f_locals); frame = frame.f_back\nassert re.search(\"'[0-9a-f]{32}'\", seen)",
        "AssertionError",
    ),
    "no program": ("def f(:", "SyntaxError"),
    "half a character": ("x = '\ud800'", "UnicodeEncodeError"),
}


def run_hostile(inside: str, home: str) -> dict[str, str | None]:
    """RuntimeError if a process is left."""
    from controlllm.benchmark import sandbox

    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)  # what loses its parent becomes ours
    texts = []
    for program, _ in PROGRAMS.values():
        texts.append(program.replace("HOME", home).replace("PID", str(os.getpid())).replace("TREE", __file__))
    sandbox.run("", inside=inside)  # says whether these walls stand here
    sandbox.walls = lambda: inside
    outcomes = sandbox.run_all(texts, workers=3, timeout=1)
    wait_for_none()
    return {name: None if o.passed else o.reason for name, o in zip(PROGRAMS, outcomes, strict=True)}


def run_orphaned() -> None:
    """Kill a runner whose program sleeps."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    program = "import time; time.sleep(1000)"
    code = f"from controlllm.benchmark import sandbox; sandbox.walls(); sandbox.run({program!r}, timeout=300)"
    runner = subprocess.Popen([sys.executable, "-c", code])
    while len(descendants(runner.pid)) < 2:
        time.sleep(0.02)
    runner.kill()
    wait_for_none()


def descendants(pid: int) -> list[int]:
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children") as file:
            children = [int(child) for child in file.read().split()]
        for child in children:
            found += [child, *descendants(child)]
    return found


def wait_for_none() -> None:
    """Until this process has no children; the dead ones are buried."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        time.sleep(0.01)
    raise RuntimeError(f"still there: {descendants(os.getpid())}")


if __name__ == "__main__":
    if sys.argv[1] == "orphaned":
        run_orphaned()
    else:
        print(json.dumps(run_hostile(*sys.argv[1:])))
