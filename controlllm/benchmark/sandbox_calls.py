"""The system calls that a sandboxed program may make: its own memory, files that it can open anyhow, time, its end.

What is missing is refused: sockets, processes and threads, signals to others, rights, limits, mounts, tracing, keys,
ioctl, new kinds of calls. Numbers are the kernel's (asm/unistd_64.h, asm-generic/unistd.h).
"""

import os
from typing import Any

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
FCNTL = {"x86_64": 72, "aarch64": 25}
FCNTL_COMMANDS = [0, 1, 2, 3, 4, 1030]  # duplicate, get and set flags; not F_SETOWN, which sends signals
# name, number on x86_64, number on aarch64
TABLE = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222,
mprotect 10 226, brk 12 214, munmap 11 215, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, pread64
17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, select 23 -, sched_yield 24 124, mremap 25 216,
madvise 28 233, dup 32 23, dup2 33 -, nanosleep 35 101, getitimer 36 102, alarm 37 -, setitimer 38 103, getpid 39
172, exit 60 93, uname 63 160, fsync 74 82, fdatasync 75 83, ftruncate 77 46, getcwd 79 17, chdir 80 49, rename 82
-, mkdir 83 -, rmdir 84 -, unlink 87 -, readlink 89 -, gettimeofday 96 169, getrusage 98 165, sysinfo 99 179, times
100 153, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, sigaltstack 131 132,
gettid 186 178, futex 202 98, sched_getaffinity 204 123, getdents64 217 61, restart_syscall 219 128, clock_gettime
228 113, clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, openat 257 56, mkdirat 258 34, newfstatat
262 79, unlinkat 263 35, renameat 264 38, readlinkat 267 78, faccessat 269 48, pselect6 270 72, ppoll 271 73,
set_robust_list 273 99, dup3 292 24, pipe 22 -, pipe2 293 59, renameat2 316 276, getrandom 318 278, statx 332 291,
rseq 334 293, faccessat2 439 439
"""


def calls() -> dict[str, Any]:
    """For this machine, as `sandbox_child.py` reads it. KeyError where there is no table for it."""
    machine = os.uname().machine
    column = 1 + list(ARCHITECTURES).index(machine) if machine in ARCHITECTURES else None
    if column is None:
        raise KeyError(machine)
    numbers = [entry.split()[column] for entry in TABLE.replace("\n", " ").split(",")]
    return {
        "architecture": ARCHITECTURES[machine],
        "allowed": [int(number) for number in numbers if number != "-"],
        "fcntl": FCNTL[machine],
        "fcntl_commands": FCNTL_COMMANDS,
    }
