"""A profile's tasks and workflows, registered with Flyte: checks the profile and its images, then runs pyflyte."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from controlllm.config.cluster import VARIABLE, Profile
from controlllm.config.pods import PODS
from controlllm.errors import UserError
from controlllm.fingerprint import PACKAGE

ROOT = PACKAGE.parent
RECIPE = "CONTROLLLM_RECIPE"
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Registration:
    """One run of `pyflyte register`."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    """The profile, as CONTROLLLM_PROFILE has it, and the launch plans' recipe, if there is one."""

    def __str__(self) -> str:
        shown = ("pyflyte", *self.command[1:])
        settings = (f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return f"{' '.join(settings)} {shlex.join(shown)}"


def registered_version(version: str, profile: Profile) -> str:
    """A task has one form under a version, and each profile gives it another: so the version names the profile."""
    return f"{version}-{profile.name}"


def registration(
    profile: Profile,
    chosen: str,
    *,
    version: str,
    images: Sequence[str],
    project: str | None = None,
    domain: str | None = None,
    recipe: str | None = None,
    activate: bool = False,
    dry_run: bool = False,
) -> Registration:
    """images: NAME=REFERENCE, one for each name that the profile's pods run in; recipe: what the launch plans run;
    activate: their schedules begin. UserError where something does not fit."""
    if not _VERSION.fullmatch(version):
        raise UserError(f"--version: must be letters, digits, '.', '_' and '-', found '{version}'")
    program = Path(sys.executable).with_name("pyflyte")
    if not program.exists():
        raise UserError(f"{program}: is not there; pip install flytekit")
    options = {"--version": registered_version(version, profile), "--project": project, "--domain": domain}
    options |= {"--service-account": profile.service_account}
    given = [word for name, value in options.items() if value for word in (name, value)]
    for name, reference in _images(profile, images).items():
        given += ["--image", f"{name}={reference}"]
    if activate and recipe is None:
        raise UserError("--activate: there is nothing to run by the clock; say with --recipe what the launch plans run")
    flags = [flag for flag, wanted in (("--activate-launchplans", activate), ("--dry-run", dry_run)) if wanted]
    environment = {VARIABLE: chosen} | ({RECIPE: _checked(recipe)} if recipe else {})
    # The images hold the code, so that what was tested and named by a version is what runs.
    return Registration((str(program), "register", "--copy", "none", *given, *flags, "workflows"), environment)


def register(wanted: Registration) -> None:
    """Run it. UserError when pyflyte fails, whose own message stands above."""
    done = subprocess.run(wanted.command, cwd=ROOT, env={**os.environ, **wanted.environment})  # noqa: S603 - no shell
    if done.returncode:
        raise UserError(f"pyflyte register ended with exit code {done.returncode}; what it said stands above")


def _checked(recipe: str) -> str:
    """Its absolute path, since pyflyte runs elsewhere; UserError for a mistake in it."""
    from controlllm.config import load_config

    load_config(recipe)
    return os.path.abspath(recipe)


def _images(profile: Profile, given: Sequence[str]) -> Mapping[str, str]:
    """By name; all that the profile's pods need, and no other."""
    images = {}
    for word in given:
        name, equals, reference = word.partition("=")
        if not (name and equals and reference):
            raise UserError(f"--image: must be NAME=REFERENCE, such as train=registry.example/train:1, found '{word}'")
        images[name] = reference
    kinds: dict[str, list[str]] = {}
    for kind in dict.fromkeys(PODS.values()):
        if (name := getattr(profile, kind).image_name) is not None:
            kinds.setdefault(name, []).append(kind)
    for name, pods in kinds.items():
        if name not in images:
            raise UserError(f"--image {name}=... is missing: the {', '.join(pods)} pods of {profile.name} run in it")
    if unused := [name for name in images if name not in kinds]:
        raise UserError(
            f"--image {unused[0]}: no pod of {profile.name} runs in it; known: {', '.join(kinds) or 'none'}"
        )
    return images
