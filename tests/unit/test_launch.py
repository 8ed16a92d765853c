"""When runs start by themselves: the profile's `launch` section, names of ticks, and which model counts as promoted."""

import os
from datetime import UTC, datetime, timedelta, timezone

import pytest

from controlllm.config import load_config
from controlllm.config.cluster import load_profile
from controlllm.config.launch import dated
from controlllm.errors import UserError
from controlllm.promote import asks, promoted
from controlllm.register import registration

POD = "{image: cpu, cpu: '1', memory: 4Gi}"
PROFILE = f"""
light: {POD}
data: {POD}
serve: {POD}
train: {{image: cpu, cpu: '1', memory: 4Gi, nodes: 1, processes_per_node: 1, gpus_per_process: 0}}
"""
TICK = datetime(2026, 11, 30, 2, 0, tzinfo=UTC)


def profile(tmp_path, launch):
    file = tmp_path / "mine.yaml"
    file.write_text(f"{PROFILE}launch: {launch}\n")
    return load_profile(str(file))


def test_a_tick_has_a_name_of_its_own():
    assert dated("demo", TICK) == "demo-2026-11-30-0200"
    assert dated("demo", TICK.astimezone(timezone(timedelta(hours=9)))) == "demo-2026-11-30-0200"
    assert dated("demo", TICK) != dated("demo", TICK + timedelta(minutes=1))
    assert len(dated("x" * 64, TICK)) <= 64
    load_config("workflows/recipes/demo.yaml", f"name={dated('x' * 64, TICK)}")


@pytest.mark.parametrize(("launch", "says"), [
    ("{nightly: 2am}", "mine.yaml:6: launch.nightly"),
    ("{nightly: '0 2 * * * *'}", "launch.nightly"),
    ("{weekley: '0 2 * * 1'}", "did you mean 'weekly'"),
    ("{notify: {email: [somebody]}}", "launch.notify.email"),
    ("{notify: {on: [finished]}}", "launch.notify.on"),
    ("{approval_hours: 0}", "launch.approval_hours"),
])  # fmt: skip
def test_mistakes_name_the_key(tmp_path, launch, says):
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        profile(tmp_path, launch)


def test_the_newest_model_of_a_recipe_counts_its_scheduled_runs_in(recipe, tmp_path):
    config = load_config(recipe)
    with pytest.raises(UserError, match="no run of tiny promoted a model"):
        promoted(config)
    for age, name in enumerate(("tiny-2026-11-30-0200", "tiny", "tiny-2026-11-29-0200", "tiny-er", "tiny-2026")):
        link = tmp_path / "runs" / name / "model"
        link.parent.mkdir(parents=True)
        link.symlink_to(tmp_path)
        os.utime(link, (1e9 - age, 1e9 - age), follow_symlinks=False)
    os.utime(tmp_path / "runs" / "tiny-er" / "model", (2e9, 2e9), follow_symlinks=False)
    assert promoted(config).parent.name == "tiny-2026-11-30-0200"


def test_nobody_is_asked_on_this_machine_and_a_line_says_so(recipe, capsys):
    config = load_config(recipe, "promote.approval=true")
    assert asks(config, someone=True)
    assert not capsys.readouterr().err
    assert not asks(config, someone=False)
    assert "asks nobody" in capsys.readouterr().err
    assert not asks(load_config(recipe), someone=True)


def test_schedules_need_a_recipe_that_is_right(recipe, tmp_path):
    told = {"version": "1", "images": ["cpu=registry.example/cpu:1"]}
    mine = profile(tmp_path, "{}")
    wanted = registration(mine, "mine.yaml", **told, recipe=str(recipe), activate=True)
    assert "--activate-launchplans" in wanted.command
    assert f"CONTROLLLM_RECIPE={recipe}" in str(wanted)
    with pytest.raises(UserError, match="--activate"):
        registration(mine, "mine.yaml", **told, activate=True)
    recipe.write_text(recipe.read_text() + "trian: {}\n")
    with pytest.raises(UserError, match="did you mean 'train'"):
        registration(mine, "mine.yaml", **told, recipe=str(recipe))
