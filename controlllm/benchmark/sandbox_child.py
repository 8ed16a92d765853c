"""The other side of the sandbox: builds walls around itself, then runs a program. Standard library only.

Started by `sandbox.py` as a script, in an environment of its own, with what to do as JSON on its stdin. The first
process stays outside and says by its exit code how the second one, which runs the program, ended.
"""

import ctypes
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import struct
import sys
import types
from typing import Any

KILLED = 64  # exit code: this plus the signal's number
NOBODY = 65534
FOLDER = "/tmp"  # noqa: S108 - of the new root: a program may write here alone
ROOT = "/proc"  # of the old root: the new root is mounted over it, and nothing that is shown lies below it
NEW_NETWORK_PID_IPC_NAMES_MOUNTS = 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000 | 0x00020000
NEW_USER = 0x10000000
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2
SET_PARENT_DEATH_SIGNAL, SET_SECCOMP, SET_NO_NEW_PRIVILEGES = 1, 22, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ_FILE, READ_FOLDER = 4, 8
libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    spec = json.load(sys.stdin)
    root = _is_root()
    _die_with_parent()
    if spec["walls"] == "namespaces":
        _leave_namespaces(root)
    ready, tell = os.pipe()
    inner = os.fork()
    if not inner:
        _confine(spec, root)
        _run(spec, tell)
    os.close(tell)
    walled = os.read(ready, 1)  # empty when the walls could not be built; no program can take back what is written
    _, status = os.waitpid(inner, 0)
    if not walled:
        os._exit(1)
    os._exit(KILLED + os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)


def _confine(spec: dict[str, Any], root: bool) -> None:
    """What cannot be undone comes last."""
    if spec["walls"] == "namespaces":
        _enter_view(spec["view"], spec["disk"])
    else:
        os.chdir("/")
    if root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    _die_with_parent()  # again: a change of user forgets it
    _call("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if spec["walls"] == "landlock":
        _landlock(spec["view"])
    limits = {resource.RLIMIT_CPU: spec["cpu"], resource.RLIMIT_AS: spec["memory"], resource.RLIMIT_CORE: 0}
    limits |= {resource.RLIMIT_FSIZE: spec["disk"], resource.RLIMIT_NOFILE: 64}
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))


def _run(spec: dict[str, Any], tell: int) -> None:
    """The program's last word: the nonce when it came to its end, else why not."""
    program, nonce, read, write, leave = spec["program"], spec["nonce"], os.read, os.write, os._exit
    sys.meta_path.append(_Packages(spec["packages"]))
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    result = os.dup(1)
    for stream in (0, 1, 2):
        os.dup2(spec["null"], stream)
    _filter_calls(spec["calls"])
    os.write(tell, b"1")
    os.close(tell)
    try:
        exec(compile(program, "solution", "exec", dont_inherit=True), module.__dict__)  # noqa: S102
        said = read(nonce, 64)
    except BaseException as error:  # noqa: BLE001 - whatever ends it, SystemExit too, is the outcome
        said = _why(error, program)
    write(result, said)
    leave(0)


def _why(error: BaseException, program: str) -> bytes:
    """`AssertionError: assert f(2) == 4`: the error's own words, or the line where it was raised."""
    name = type(error).__name__
    try:
        lines, trace, line = program.splitlines(), error.__traceback__, ""
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == "solution":
                line = lines[trace.tb_lineno - 1].strip()
            trace = trace.tb_next
        name += f": {str(error) or line}"
    except BaseException:  # noqa: BLE001, S110 - its words are the program's code, too; its name is enough
        pass
    return name.encode(errors="replace")[:1000]


class _Packages:
    """Finds the few packages that a program may import beside the standard library."""

    def __init__(self, folders: dict[str, str]):
        self.folders = folders

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self.folders:
            return None
        folder = self.folders[name]
        return importlib.util.spec_from_file_location(
            name, f"{folder}/__init__.py", submodule_search_locations=[folder]
        )


def _call(name: str, *args: Any) -> None:
    """A function of libc that gives 0 when it worked. OSError names it."""
    if getattr(libc, name)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _die_with_parent() -> None:
    _call("prctl", SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _is_root() -> bool:
    """Who may become another user; the root of a container that knows no other user may not."""
    with open("/proc/self/uid_map") as file:
        spans = [(int(first), int(count)) for first, _, count in map(str.split, file)]
    return os.geteuid() == 0 and any(first <= NOBODY < first + count for first, count in spans)


def _leave_namespaces(root: bool) -> None:
    """Of network, processes, shared memory, names and mounts; as a user without rights over them, of users too."""
    uid, gid = os.geteuid(), os.getegid()
    if root:
        return _call("unshare", NEW_NETWORK_PID_IPC_NAMES_MOUNTS)
    _call("unshare", NEW_NETWORK_PID_IPC_NAMES_MOUNTS | NEW_USER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [text if text is None else text.encode() for text in (source, target, kind)]
    _call("mount", *texts, ctypes.c_ulong(flags), options if options is None else options.encode())


def _enter_view(view: list[str], disk: int) -> None:
    """A root that holds `view`, read-only, and an empty folder of `disk` bytes in memory that ends with the process."""
    os.umask(0o022)
    _mount(None, "/", None, RECURSIVE | PRIVATE)
    _mount("tmpfs", ROOT, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    for path in view:
        place = ROOT + path
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), place)
            continue
        if os.path.isdir(path):
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY))
        _mount(path, place, None, BIND | RECURSIVE)
        kept = os.statvfs(place).f_flag & NO_EXEC  # what a mount forbids, a user's remount must forbid, too
        _mount(None, place, None, BIND | REMOUNT | READ_ONLY | NO_SUID | NO_DEVICES | kept)
    os.mkdir(ROOT + FOLDER)
    _mount("tmpfs", ROOT + FOLDER, "tmpfs", NO_SUID | NO_DEVICES | NO_EXEC, f"size={disk},nr_inodes=1000,mode=1777")
    _mount(None, ROOT, None, BIND | REMOUNT | READ_ONLY | NO_SUID | NO_DEVICES)
    os.chdir(ROOT)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", DETACH)
    os.chdir(FOLDER)


def _landlock(view: list[str]) -> None:
    """No file but those of `view` can be opened, and none changed (docs.kernel.org/userspace-api/landlock.html)."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        raise OSError(ctypes.get_errno(), "landlock: this kernel has none")
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # all that this version can forbid
    rules = libc.syscall(LANDLOCK_CREATE, struct.pack("Q", rights), 8, 0)
    if rules < 0:
        raise OSError(ctypes.get_errno(), "landlock: no rules")
    for path in view:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        right = READ_FILE | (READ_FOLDER if os.path.isdir(path) else 0)
        if libc.syscall(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", right, folder), 0):
            raise OSError(ctypes.get_errno(), f"landlock: {path}")
        os.close(folder)
    if libc.syscall(LANDLOCK_RESTRICT, rules, 0):
        raise OSError(ctypes.get_errno(), "landlock: refused")
    os.close(rules)


def _filter_calls(calls: dict[str, Any]) -> None:
    """Only these system calls; the others fail with EPERM, so there is no second thread, process or socket."""
    load, equal, give = 0x20, 0x15, 0x06  # of classic BPF; what is loaded: 0 the call's number, 4 the architecture
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050000 | 1
    steps = [(load, 0, 0, 4), (equal, 1, 0, calls["architecture"]), (give, 0, 0, kill), (load, 0, 0, 0)]
    for number in calls["allowed"]:
        steps += [(equal, 0, 1, number), (give, 0, 0, allow)]
    steps += [(equal, 1, 0, calls["fcntl"]), (give, 0, 0, refuse), (load, 0, 0, 24)]  # 24: its second argument
    for command in calls["fcntl_commands"]:
        steps += [(equal, 0, 1, command), (give, 0, 0, allow)]
    steps.append((give, 0, 0, refuse))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    _call("prctl", SET_SECCOMP, 2, struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)), 0, 0)


if __name__ == "__main__":
    main()
