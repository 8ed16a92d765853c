"""Which change makes which stages again, and which makes none: a table over the inputs of a real tiny run.

The run is made once. After each change every stage is looked at by itself, with the stored outputs of those before it:
`direct` are the stages whose own inputs changed. What comes after them follows from their outputs.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from controlllm import fingerprint, pipeline
from controlllm.config import load_config
from controlllm.explain import every_stage

pytestmark = pytest.mark.slow
ORDER = ("ingest model", "ingest data", "prepare", "train", "consolidate", "benchmark", "dial", "probe", "report")
TASKS = {  # the stages that the cache version of a Flyte task is made of
    "ingest": ("ingest model", "ingest data"),
    "prepare": ("prepare",),
    "train": ("train",),
    "consolidate": ("consolidate",),
    "benchmark": ("benchmark task", "benchmark"),
    "dial": ("benchmark task", "dial"),
    "probe": ("probe",),
    "smoke": ("smoke",),
}
RECIPE = """
name: tiny
output: {home}/runs
model: {{name: {home}/base}}
control: {{num_expanded: 2}}
mix: {{datasets: [{{name: a, source: {home}/a.jsonl, format: messages}}]}}
pack: {{context_length: 256, unit_rows: 64, validation_fraction: 0.1}}
train: {{steps: 2, precision: float32, global_batch_size: 2}}
validation: {{every: 2, rows: 1}}
benchmark: {{new: [puzzles], old: [chat], items: 4, dtype: float32, backend: hf}}
probe: {{prompts: [one, two]}}
report: {{dial: [0.5]}}
smoke: null
"""


def rows(numbers):
    for number in numbers:
        asked = {"role": "user", "content": f"question {number:04}?"}
        yield json.dumps({"messages": [asked, {"role": "assistant", "content": f"answer {number:04}"}]}) + "\n"


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """A folder with the run's recipe, data, base model, store, and a copy of the package."""
    home = tmp_path_factory.mktemp("truth") / "home"
    shutil.copytree(tiny_base, home / "base")
    (home / "a.jsonl").write_text("".join(rows(range(80))))
    (home / "recipe.yaml").write_text(RECIPE.format(home=home))
    shutil.copytree(fingerprint.PACKAGE, home / "package", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTROLLLM_CACHE", str(home / "cache"))
        patch.setattr(fingerprint, "PACKAGE", home / "package")
        pipeline.run(load_config(home / "recipe.yaml"))
    return home


@pytest.fixture
def home(made, monkeypatch):
    """As it was made; what a test changes is put back."""
    monkeypatch.setenv("CONTROLLLM_CACHE", str(made / "cache"))
    monkeypatch.setattr(fingerprint, "PACKAGE", made / "package")
    fingerprint.source_hash.cache_clear()
    fingerprint.version.cache_clear()
    kept = [file for file in made.rglob("*") if file.is_file() and "cache" not in file.relative_to(made).parts]
    before = {file: (file.read_bytes(), file.stat()) for file in kept if file.suffix != ".safetensors"}
    yield made
    for file, (text, status) in before.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    fingerprint.source_hash.cache_clear()
    fingerprint.version.cache_clear()


def direct(home, *overrides, recipe="recipe.yaml") -> set[str]:
    """Stages that would compute, whatever those before them give."""
    return {stage for stage, line in every_stage(load_config(home / recipe, *overrides)) if "cached" not in line}


def versions() -> dict[str, list[str]]:
    """Flyte's cache versions, by task."""
    return {task: [fingerprint.code_version(stage) for stage in stages] for task, stages in TASKS.items()}


# change: the stages whose own inputs it changes. The report has the whole recipe among its inputs.
SETTINGS = {
    "train.lr=0.5": {"train"},
    "train.steps=3": {"train"},
    "train.seed=9": {"train"},
    "train.global_batch_size=3": {"train"},
    "train.optimizer.weight_decay=0.3": {"train"},
    "train.schedule.warmup_steps=1": {"train"},
    "mix.seed=5": {"train"},
    "mix.temperature=2.0": {"train"},
    "mix.order=length": {"train"},
    "mix.datasets.0.epochs=2.0": {"train"},
    "validation.every=1": {"train"},
    "model.attention=sdpa": {"train"},
    "control.num_expanded=1": {"train", "consolidate"},
    "control.interpolation=dlerp": {"train", "consolidate"},
    "control.divergence=cosine": {"train", "consolidate"},
    "control.alpha=0.25": {"train", "consolidate"},
    "pack.context_length=128": {"prepare"},
    "pack.overlong=drop": {"prepare"},
    "pack.validation_fraction=0.2": {"prepare"},
    "pack.strategy=pad": {"prepare"},
    "pack.unit_rows=20": {"ingest data", "prepare"},
    "mix.datasets.0.rows=40": {"ingest data", "prepare"},
    "mix.datasets.0.dedup=true": {"prepare"},
    "mix.decontaminate=none": {"ingest data"},
    "benchmark.items=3": {"ingest data"},
    "benchmark.dtype=bfloat16": {"benchmark", "dial"},
    "probe.prompts=[one]": {"probe"},
    "report.dial=[0.25]": {"dial"},
    "benchmark.margin=3.0": {"dial"},
}


@pytest.mark.parametrize("change", SETTINGS)
def test_a_setting_makes_its_stage_again(home, change):
    found = direct(home, change)
    assert found - {"report"} >= SETTINGS[change]
    first = min(map(ORDER.index, found))
    assert found - {"report"} <= SETTINGS[change] | {"dial"}
    assert "report" in found
    assert first == min(map(ORDER.index, SETTINGS[change] | {"report"}))


CODE = {
    "train/native.py": {"train"},
    "train/optim.py": {"train"},
    "control/loss.py": {"train", "consolidate", "benchmark", "probe"},
    "control/interpolation.py": {"train", "consolidate", "benchmark", "probe"},
    "data/pack.py": {"prepare"},
    "data/render.py": {"prepare"},
    "data/probes.py": {"ingest data", "prepare"},
    "base_model.py": {"ingest model"},
    "benchmark/harness.py": {"benchmark"},
    "benchmark/suites/suites.yaml": {"benchmark"},
    "benchmark/stage.py": {"benchmark"},
    "dial.py": {"dial"},
    "probe/measure.py": {"probe"},
    "gate.py": {"report"},
    "templates/report.css": {"report"},
}


@pytest.mark.parametrize("file", CODE)
def test_code_makes_its_stages_again(home, file):
    before = versions()
    path = home / "package" / file
    path.write_text(path.read_text() + ("\nADDED = 1\n" if file.endswith(".py") else "\n# added\n"))
    fingerprint.source_hash.cache_clear()
    assert direct(home) == CODE[file]
    changed = {task for task, now in versions().items() if now != before[task]}
    stages = CODE[file] - {"report"}
    named = {task for task, parts in TASKS.items() if {part.replace(" task", "") for part in parts} & stages}
    assert changed - {"smoke"} >= named - {"dial"}
    assert changed <= named | {"dial", "smoke"}


LIBRARIES = {
    "peft": {"train", "consolidate"},
    "lm-eval": {"benchmark"},
    "tokenizers": {"prepare"},
    "altair": {"report"},
    "torch": {"ingest data", "train", "consolidate", "benchmark", "probe"},
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_librarys_version_makes_its_stages_again(home, name, tmp_path, monkeypatch):
    before = versions()
    (tmp_path / f"{name.replace('-', '_')}-99.9.dist-info").mkdir()
    (tmp_path / f"{name.replace('-', '_')}-99.9.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 99.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    fingerprint.version.cache_clear()
    assert direct(home) == LIBRARIES[name]
    assert (versions() != before) == (name != "altair")


DATA = {
    "a row more": lambda text: text + "".join(rows([900])),
    "a row fewer": lambda text: "".join(rows(range(79))),
    "a letter": lambda text: text.replace("answer 0003", "answex 0003"),
}


@pytest.mark.parametrize("change", DATA)
def test_data_makes_what_reads_it_again(home, change):
    file = home / "a.jsonl"
    file.write_text(DATA[change](file.read_text()))
    assert direct(home) == {"ingest data"}


# What changes nothing that an output depends on


def comment(home):
    path = home / "package" / "train" / "native.py"
    path.write_text("# a comment\n" + path.read_text() + "\n# another\n")


def docstring(home):
    path = home / "package" / "control" / "loss.py"
    head, _, rest = path.read_text().partition('"""')
    path.write_text(f'{head}"""Other words.{rest[rest.index(chr(34) * 3) :]}')


def blank_lines(home):
    path = home / "package" / "data" / "pack.py"
    path.write_text(path.read_text().replace("\n\n\n", "\n\n\n\n\n"))


def wrapped(home):
    path = home / "package" / "base_model.py"
    path.write_text(path.read_text().replace("import json\n", "import  json\n", 1))


def other_module(home):
    path = home / "package" / "cli.py"
    path.write_text(path.read_text() + "\nADDED = 1\n")


def new_module(home):
    (home / "package" / "unused.py").write_text("X = 1\n")


def compiled(home):
    (home / "package" / "train" / "__pycache__").mkdir()
    (home / "package" / "train" / "__pycache__" / "native.pyc").write_bytes(b"x")


def touched_code(home):
    for file in (home / "package").rglob("*.py"):
        os.utime(file)


def touched_outputs(home):
    for file in (home / "cache").rglob("*"):
        os.utime(file, follow_symlinks=False)


def key_order(home):
    tree = yaml.safe_load((home / "recipe.yaml").read_text())
    (home / "recipe.yaml").write_text(yaml.safe_dump(dict(reversed(tree.items())), sort_keys=False))


def recipe_comments(home):
    text = (home / "recipe.yaml").read_text()
    (home / "recipe.yaml").write_text("# mine\n\n" + text.replace("\n", "   # here\n", 3))


def spelled_out(home):
    tree = load_config(home / "recipe.yaml").model_dump(mode="json")
    (home / "recipe.yaml").write_text(yaml.safe_dump(tree))


COSMETIC = {
    "a comment in code": comment,
    "a docstring": docstring,
    "blank lines": blank_lines,
    "blanks in a line": wrapped,
    "a module of no stage": other_module,
    "a new module of no stage": new_module,
    "compiled files": compiled,
    "times of code": touched_code,
    "times of outputs": touched_outputs,
    "order of the recipe's keys": key_order,
    "comments in the recipe": recipe_comments,
    "defaults written out": spelled_out,
}


@pytest.mark.parametrize("change", COSMETIC)
def test_what_is_cosmetic_makes_nothing_again(home, change):
    before = versions()
    COSMETIC[change](home)
    fingerprint.source_hash.cache_clear()
    assert direct(home) == set()
    assert versions() == before
    for extra in (home / "package" / "unused.py", home / "package" / "train" / "__pycache__"):
        shutil.rmtree(extra, ignore_errors=True)
        Path(extra).unlink(missing_ok=True) if extra.is_file() else None


MEANS = {
    "output=elsewhere": set(),
    "train.micro_batch_size=2": {"report"},
    "train.checkpoint.every=7": {"report"},
    "train.activation_checkpointing=full": {"report"},
    "train.guards.hang_seconds=800": {"report"},
    "train.metrics.trackers=[tensorboard]": {"report"},
    "benchmark.batch_size=3": {"report"},
    "mix.datasets.0.weight=null": set(),
}


@pytest.mark.parametrize("change", MEANS)
def test_how_the_work_is_done_makes_no_work_again(home, change):
    """The report alone has the whole recipe on its page."""
    assert direct(home, change) == MEANS[change]


def test_the_table_is_as_long_as_it_should_be():
    assert len(SETTINGS) + len(CODE) + len(LIBRARIES) + len(DATA) >= 40
    assert len(COSMETIC) + len(MEANS) >= 20
