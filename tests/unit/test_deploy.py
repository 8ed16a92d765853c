"""The Makefile, the pins and the images: checked without a network or a daemon."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from controlllm.config.cluster import load_profile, profile_names
from controlllm.config.pods import PODS

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
SCRIPTS = [*sorted((ROOT / "docker").glob("*.sh")), ROOT / ".ci/run"]


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def make(*arguments: str) -> str:
    """What `make` would run if the installation were there; not told what the `make` around this test was told."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "RECIPE", "SET"))}
    done = run("make", "-n", "-o", ".venv/.installed-main", "-o", ".venv/.installed-dev", *arguments, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pins() -> dict[str, str]:
    lines = (ROOT / "docker/constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


# Makefile and CI


def test_make_alone_explains_every_target():
    listed = re.findall(r"^make (\S+) +\S", run("make").stdout, flags=re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony
    assert listed == phony[1].split()


def test_finetune_checks_the_recipe_and_runs_the_workflow():
    assert make("finetune").splitlines() == [
        '.venv/bin/controlllm config check "workflows/recipes/demo.yaml"',
        '.venv/bin/pyflyte run workflows/finetune.py finetune --config "workflows/recipes/demo.yaml"',
    ]


def test_set_runs_the_recipe_with_its_overrides():
    commands = make("finetune", "RECIPE=my.yaml", "SET=train.lr=1e-4 train.steps=5")
    assert 'config show "my.yaml" train.lr=1e-4 train.steps=5 > ".controlllm/recipe.yaml"' in commands
    assert commands.splitlines()[-1].endswith('finetune --config ".controlllm/recipe.yaml"')


def test_contrast_runs_the_contrast_recipe():
    assert "finetune RECIPE=workflows/recipes/demo-contrast.yaml" in make("contrast")


def test_ci_lints_and_tests_as_a_person_does():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert re.findall(r"^make .*$", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE) == ["make lint", "make test"]


def test_scripts_pass_shellcheck():
    done = run(BIN / "shellcheck", "--external-sources", *SCRIPTS)
    assert done.returncode == 0, done.stdout


# Installing


@pytest.fixture
def bare_machine(tmp_path: Path) -> Path:
    """A checkout on a machine with a shell and little else: no uv, no Python."""
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "env", "dirname"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    shutil.copytree(ROOT / "docker", tmp_path / "check out" / "docker")
    return tmp_path


def install(machine: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run("docker/install.sh", "demo", cwd=machine / "check out", env={"PATH": str(machine / "bin"), **env})


def fake_python(machine: Path, body: str) -> str:
    file = machine / "bin" / "fake-python"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return str(file)


def test_no_python_is_one_clear_line(bare_machine: Path):
    done = install(bare_machine)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Python 3.11 or 3.12 is needed" in done.stderr


def test_an_old_python_is_named(bare_machine: Path):
    python = fake_python(bare_machine, "exit 1")  # what the version check says of 3.10
    done = install(bare_machine, PYTHON=python)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert python in done.stderr


def test_neither_pip_nor_ensurepip_names_the_package_to_install(bare_machine: Path):
    python = fake_python(
        bare_machine, 'case "$*" in *version_info*) exit 0 ;; *sys.executable*) echo "$0" ;; *) exit 1 ;; esac'
    )
    done = install(bare_machine, PYTHON=python)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "apt-get install python3-venv" in done.stderr


def test_pins_are_names_and_versions_only():
    lines = (ROOT / "docker/constraints.txt").read_text().splitlines()[1:]
    assert lines == sorted(lines)
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    assert len(pins()) == len(lines)


def test_every_requirement_is_pinned_within_its_bounds():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    requirements = [Requirement(line) for group in groups for line in group]
    pinned = pins()
    unmet = [str(r) for r in requirements if not r.specifier.contains(pinned.get(canonicalize_name(r.name), "0"))]
    assert unmet == [], "run make lock"


def test_every_override_has_its_reason():
    paragraphs = (ROOT / "docker/overrides.txt").read_text().strip().split("\n\n")
    assert all(paragraph.startswith("#") for paragraph in paragraphs)
    names = {line for paragraph in paragraphs for line in paragraph.splitlines() if not line.startswith("#")}
    assert f"torch=={pins()['torch']}" in names


def test_what_git_ignores_is_not_shipped_to_the_cluster():
    ignored, unshipped = (
        {line.rstrip("/") for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")}
        for name in (".gitignore", ".flyteignore")
    )
    assert ignored < unshipped


# Images


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.stem)
def test_dockerfile(dockerfile: Path):
    done = run(BIN / "hadolint", dockerfile)
    assert done.returncode == 0, done.stdout

    text = dockerfile.read_text()
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.MULTILINE) for word in line.split()[:-1]
    ]
    missing = [path for path in copied if not (ROOT / path).exists()]
    assert copied
    assert missing == []
    extras = re.findall(r"--extra (\S+)", text)
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    uv = re.search(r"^UV_VERSION=(.*)$", (ROOT / "docker/uv.sh").read_text(), flags=re.MULTILINE)
    assert uv
    assert f"uv=={uv[1]} " in text


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.stem)
def test_an_image_has_no_root_a_healthcheck_and_a_bill_of_materials(dockerfile: Path):
    stages = re.split(r"^FROM ", dockerfile.read_text(), flags=re.MULTILINE)[1:]
    names = [match[1] if (match := re.search(r" AS (\S+)$", stage.splitlines()[0])) else "" for stage in stages]
    assert names[-3:] == ["listed", "sbom", ""], "what is built without --target is the image"
    image, bill = stages[-1], stages[-2]
    assert re.search(r"^USER 1000$", image, flags=re.MULTILINE)
    assert "HEALTHCHECK" in image
    assert "pip install" not in image
    assert bill.startswith("scratch AS sbom")
    assert "cyclonedx-py environment" in stages[-3]


def test_images_of_the_profiles_are_those_that_are_built():
    built = {file.name.removesuffix(".Dockerfile") for file in DOCKERFILES}
    used = {profile.pod(task).image_name for profile in map(load_profile, profile_names()) for task in PODS}
    assert used == built


def test_the_context_of_an_image_holds_what_is_copied_and_no_more():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "everything stays outside unless it is named"
    named = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = set()
    for dockerfile in DOCKERFILES:
        for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile.read_text(), flags=re.MULTILINE):
            copied |= set(line.split()[:-1])
    assert copied == named
