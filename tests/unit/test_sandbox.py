import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import PROGRAMS

from controlllm.benchmark import sandbox
from controlllm.benchmark.sandbox import NoWalls, Outcome, run, run_all
from controlllm.errors import UserError

SCRIPT = Path(__file__).with_name("hostile.py")
UNPRIVILEGED = ["unshare", "--user", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
MODES = {
    "as I am": ("namespaces", []),
    "unprivileged": ("namespaces", UNPRIVILEGED),
    "landlock": ("landlock", UNPRIVILEGED),
}
HARMLESS = {
    "nothing": "",
    "text": "print('x' * 10**6)",
    "tests as they are written": "def f(x): return x + 1\ndef check(c):\n    assert c(1) == 2\ncheck(f)",
    "numpy": "import numpy as np\nassert np.allclose(np.linalg.inv(np.eye(3)) @ np.ones(3), 1)",
    "classes": "import dataclasses, collections, typing\n@dataclasses.dataclass\nclass A:\n    x: typing.List[int]\n"
    "P = collections.namedtuple('P', 'x y')\nassert A([1]) == A([1]) and P(1, 2).y == 2",
    "a main part, which is not run": "if __name__ == '__main__':\n    raise ValueError",
    "an alarm": "import signal\nsignal.signal(signal.SIGALRM, lambda *a: None)\nsignal.alarm(1)\nsignal.alarm(0)",
    "large integers": "import math, decimal, fractions\nassert math.factorial(2000) % 1999 == 0",
    "patched functions": "import os, sys\nos.write = os.read = os._exit = exec = None\nsys.stdout = None",
    "time": "import time, datetime, random\ntime.sleep(0.01)\nrandom.random(), datetime.datetime.now()",
    "a long program": "x = [\n" + "    1,\n" * 100_000 + "]\nassert sum(x) == 100_000",
}


@pytest.fixture(scope="module", params=MODES)
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """How every hostile program ended, in a process of its own whose home they try to get at."""
    inside, prefix = MODES[request.param]
    home = tmp_path_factory.mktemp("home")
    (home / "secret").write_text("secret")
    home.chmod(0o777)
    environment = os.environ | {"HOME": str(home), "TOKEN": "hidden", "OMP_NUM_THREADS": "1"}
    command = [*prefix, sys.executable, str(SCRIPT), inside, str(home)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "NoWalls" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert [(file.name, file.read_text()) for file in home.iterdir()] == [("secret", "secret")]
    return json.loads(done.stdout)


def test_hostile_programs_get_nothing_and_leave_nothing(ended: dict[str, str | None]) -> None:
    contained = {name: said is not None and re.search(PROGRAMS[name][1], said) for name, said in ended.items()}
    assert len(contained) >= 25
    assert [(name, ended[name]) for name, right in contained.items() if not right] == []


def test_no_mount_folder_or_file_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mounts = Path("/proc/self/mountinfo").read_text()
    run("open('x', 'w').write('x')")
    run("while True: pass", timeout=1)
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert list(tmp_path.iterdir()) == []


def test_programs_die_with_their_runner() -> None:
    subprocess.run([sys.executable, str(SCRIPT), "orphaned"], check=True, timeout=120)


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_programs_pass(name: str) -> None:
    assert run(HARMLESS[name]) == Outcome(passed=True)


def test_a_program_finds_an_empty_folder_and_may_write_there() -> None:
    if sandbox.walls() != "namespaces":
        pytest.skip("nothing can be written within Landlock")
    program = (
        "import os, tempfile\nassert os.listdir() == []\nopen('x', 'w').write('a')\nassert open('x').read() == 'a'"
    )
    assert [run(program), run(program)] == [Outcome(passed=True)] * 2  # the second finds nothing of the first


def test_the_reason_names_the_error_or_the_line() -> None:
    assert run("x = 1\nassert x == 2").reason == "AssertionError: assert x == 2"
    assert run("[][1]").reason == "IndexError: list index out of range"
    assert len(run("raise ValueError('x' * 10**6)").reason) <= 300


def test_a_program_that_reads_input_finds_none() -> None:
    assert run("input()").reason == "EOFError: EOF when reading a line"


def test_memory_is_limited_as_asked() -> None:
    program = "x = bytes(400 << 20)"
    assert run(program).passed
    assert run(program, memory=200 << 20).reason.startswith("MemoryError")


def test_the_same_sets_in_the_same_order() -> None:
    program = "assert 0, list({'a', 'b', 'c', 'd', 'e', 'f'})"
    assert len({run(program).reason for _ in range(3)}) == 1


def test_many_at_a_time_in_their_order() -> None:
    told: list[int] = []
    outcomes = run_all([f"assert {i} % 3" for i in range(9)], workers=3, advance=told.append)
    assert [outcome.passed for outcome in outcomes] == [bool(i % 3) for i in range(9)]
    assert told == list(range(1, 10))


def test_what_the_same_process_cannot_prevent() -> None:
    """An answer that says that it is equal to everything."""
    liar = "class Liar:\n    def __eq__(self, other): return True\ndef f(): return Liar()\n"
    assert run(liar + "assert f() == 3").passed


def test_nothing_runs_where_no_walls_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text("raise PermissionError('unshare: no')")
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(NoWalls, match="landlock: PermissionError: unshare: no") as error:
        sandbox.walls.__wrapped__()
    assert isinstance(error.value, UserError)
    assert "\n" not in str(error.value)
    with pytest.raises(NoWalls, match="namespaces: PermissionError"):
        run("", inside="namespaces")


def test_walls_with_a_hole_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that builds none."""
    text = sandbox.CHILD.read_text()
    child = tmp_path / "child.py"
    child.write_text(text.replace("    _confine(spec, root)\n", "    pass\n").replace("_filter_calls(spec", "id(spec"))
    assert child.read_text() != text
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(NoWalls, match="the walls have a hole"):
        sandbox.walls.__wrapped__()


def test_other_systems_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NoWalls, match="on other systems leave the code tasks out"):
        sandbox.walls.__wrapped__()


def test_other_processors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "calls", lambda: {}["riscv64"])
    with pytest.raises(NoWalls, match="no list of system calls for 'riscv64'"):
        sandbox._places.__wrapped__()


def test_the_root_of_a_container_without_other_users_is_walled_in_too() -> None:
    code = "from controlllm.benchmark import sandbox; print(sandbox.walls())"
    done = subprocess.run(["unshare", "-Ur", sys.executable, "-c", code], capture_output=True, text=True)
    if "unshare:" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.stdout == "namespaces\n", done.stderr


def test_an_interrupted_run_starts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    started: list[float] = []
    real = sandbox._ended
    monkeypatch.setattr(sandbox, "_ended", lambda seconds, **files: started.append(seconds) or real(seconds, **files))
    with pytest.raises(KeyboardInterrupt):
        run_all(["", *["import time; time.sleep(1000)"] * 50], workers=1, timeout=1, advance=stop)
    assert len(started) <= 3
