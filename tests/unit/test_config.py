"""Recipes in, one frozen config out, and back to text."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from controlllm.config import Config, RunConfig, load_config
from controlllm.errors import UserError
from controlllm.recipe import dotted, read, read_override, read_recipe, write

RECIPE = """\
name: tiny
model:
  name: org/model
control:
  num_expanded: 2
mix:
  datasets:
    - name: puzzles
      rows: 50
train:
  steps: 4
  lr: 1e-4
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE)
    return file


def test_defaults_and_numbers(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.train.lr == 1e-4
    assert config.train.optimizer.eps == 1e-8
    assert config.lora is None


def test_nobody_mutates_a_config(recipe: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_config(recipe).train.steps = 5  # type: ignore[misc]


def test_overrides_apply_left_to_right(recipe: Path) -> None:
    config = load_config(
        recipe, "train.lr=1e-5", "train.lr=2.5E-6", "mix.datasets.0.rows=5", "control=null", "pack={context_length: 64}"
    )
    assert config.train.lr == 2.5e-6
    assert config.train.steps == 4
    assert config.mix.datasets[0].rows == 5
    assert config.control is None
    assert config.pack.context_length == 64


def test_override_turns_a_section_on(recipe: Path) -> None:
    assert load_config(recipe, "train.profile.wait=7").train.profile is not None


def test_override_of_a_section_hides_what_the_recipe_said_below(recipe: Path) -> None:
    """The message must point at the override, not at the recipe's line for the same key."""
    with pytest.raises(UserError, match=r"^override 'train=\{lr: 5\}': train\.lr: must be at most 1, found 5$"):
        load_config(recipe, "train={lr: 5}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1e-4", 1e-4),
        ("a=-1E+3", -1000.0),
        ("a=.5", 0.5),
        ("a=5", 5),
        ("a=010", "010"),
        ("a=1:30", "1:30"),
        ("a=on", "on"),
        ("a=2024-01-01", "2024-01-01"),
        ("a=true", True),
        ("a=~", None),
        ("a=", None),
        ("a='5'", "5"),
        ("a=x=y", "x=y"),
    ],
)
def test_plain_values(text: str, value: Any) -> None:
    _, found = read_override(text)
    assert (found, type(found)) == (value, type(value))


def test_every_key_knows_its_line(recipe: Path) -> None:
    lines = {dotted(path): line for path, line in read_recipe(recipe)[1].lines.items()}
    assert lines["model"] == 2
    assert lines["model.name"] == 3
    assert lines["mix.datasets.0"] == 8
    assert lines["mix.datasets.0.rows"] == 9
    assert lines["train.lr"] == 12


def test_all_mistakes_are_counted_and_unknown_keys_come_first(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("steps: 4", "steps: -4\n  stepz: 4").replace("num_expanded: 2", "num_expanded: 0"))
    with pytest.raises(
        UserError, match=r"tiny\.yaml:12: unknown key 'train\.stepz'; did you mean 'steps'\? \(and 2 more\)$"
    ):
        load_config(recipe)


@pytest.mark.parametrize("name", ["1e-4", "010", "on", "2024-01-01", "null", "0x10", "1_000", "12.5"])
def test_a_shown_config_reads_back_equal(recipe: Path, tmp_path: Path, name: str) -> None:
    """Names that some YAML reader takes for another type are where a dumper goes wrong."""
    dataset = "{name: '" + name + "', source: 'ä b.jsonl', format: text, fields: {text: 'yes: #1'}}"
    config = load_config(recipe, f"name='{name}'", f"mix.datasets=[{dataset}]", "train.parallel={kind: fsdp}")
    shown = tmp_path / "shown.yaml"
    shown.write_text(write(config.model_dump(mode="json")))
    assert load_config(shown) == config
    assert RunConfig.model_validate(yaml.safe_load(shown.read_text())) == config


_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
)
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)


@given(tree=st.dictionaries(st.text(max_size=9), _values, min_size=1, max_size=4))
def test_anything_written_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    file = tmp_path_factory.mktemp("written") / "tree.yaml"
    file.write_text(write(tree), encoding="utf-8")
    assert read(file)[0] == tree


@pytest.mark.parametrize("text", ["1e-4", "1.e-4", ".5e-3", "1E4"])
def test_exponents_read_as_text_by_another_yaml_reader_are_numbers(text: str) -> None:
    """pyflyte hands recipes over as PyYAML's YAML 1.1 reads them."""
    tree = {"name": "x", "model": {"name": "m"}, "mix": {"datasets": [{"name": "d"}]}}
    config = RunConfig.model_validate({**tree, "control": {"divergence_weight": text}})
    assert config.control is not None
    assert config.control.divergence_weight == float(text)


def test_every_key_is_documented() -> None:
    """A section's own docstring serves for the key that holds it."""
    sections = Config.__subclasses__()
    keys = [(section, name, field) for section in sections for name, field in section.model_fields.items()]
    assert [section.__name__ for section in sections if not section.__doc__] == []
    assert [
        f"{section.__name__}.{name}"
        for section, name, field in keys
        if not field.description and "Config" not in str(field.annotation)
    ] == []
