"""What made an output, beside its inputs: the commit, the image, the cluster profile, the execution."""

import os
import platform
import subprocess
from functools import cache
from shutil import which
from typing import Any

from controlllm.fingerprint import PACKAGE, version
from controlllm.private import public

EXECUTION = ("FLYTE_INTERNAL_EXECUTION_PROJECT", "FLYTE_INTERNAL_EXECUTION_DOMAIN", "FLYTE_INTERNAL_EXECUTION_ID")
"""What Flyte tells every pod."""


@cache
def origin() -> dict[str, Any]:
    """Of this process; what is not known is left out.

    commit: of the checkout, or `CONTROLLLM_COMMIT` of an image. changed: files of the package that are other than in
    the commit; the hashes of the code among a stage's inputs hold in any case.
    """
    found = {"controlllm": version("controlllm"), "python": platform.python_version()} | _commit()
    found |= {"image": os.environ.get("FLYTE_INTERNAL_IMAGE"), "profile": os.environ.get("CONTROLLLM_PROFILE")}
    found |= {"execution": "/".join(filter(None, map(os.environ.get, EXECUTION)))}
    return public({name: value for name, value in found.items() if value})


def _commit() -> dict[str, Any]:
    if told := os.environ.get("CONTROLLLM_COMMIT"):
        return {"commit": told}
    if not (PACKAGE.parent / ".git").exists():
        return {}
    commit = _git("rev-parse", "HEAD")
    changed = [line[3:] for line in _git("status", "--porcelain", "--", PACKAGE.name).splitlines()]
    return {"commit": commit.strip(), "changed": changed} if commit else {}


def _git(*arguments: str) -> str:
    """What git says; empty where there is none, or where it refuses this checkout."""
    if (program := which("git")) is None:
        return ""
    command = [program, "--no-optional-locks", "-C", str(PACKAGE.parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
    return done.stdout if done.returncode == 0 else ""
