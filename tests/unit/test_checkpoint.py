"""Checkpoints of one process: what is read is what was written, or one line says why not."""

import resource
import shutil
import subprocess

import pytest
import torch
from saved_steps import big, checkpoints, names, restored, small, value, write
from torch import nn

from controlllm.config import ControlConfig
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError
from controlllm.train.checkpoint import trained_tensors
from controlllm.train.checkpoint_files import MANIFEST

# Round trips


def states(optimizer):
    return [
        {key: tensor.clone() for key, tensor in optimizer.state[p].items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def control(model, **changes):
    settings = ControlSettings.resolve(ControlConfig(num_expanded=2, interpolation="dlerp", **changes), num_layers=4)
    return expand_model(model, settings).train()


def a_step(model, optimizer, seed):
    ids = torch.randint(2, 258, (2, 9), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_read_is_what_was_written(tiny_base, tmp_path, fused):
    from transformers import AutoModelForCausalLM

    def fresh():
        model = control(AutoModelForCausalLM.from_pretrained(tiny_base))
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, fused=fused)

    model, optimizer = fresh()
    a_step(model, optimizer, 1)
    store = checkpoints(tmp_path)
    store.save(model, optimizer, {"step": 1, "nested": {"a": [1, None, "x"]}})
    kept = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}, states(optimizer)
    a_step(model, optimizer, 2)  # while it is written
    store.wait()
    again, its_optimizer = fresh()
    assert checkpoints(tmp_path).restore(again, its_optimizer) == {"step": 1, "nested": {"a": [1, None, "x"]}}
    torch.testing.assert_close((trained_tensors(again), states(its_optimizer)), kept, rtol=0, atol=0)
    assert [group["lr"] for group in its_optimizer.param_groups] == [1e-2]
    a_step(again, its_optimizer, 2)
    torch.testing.assert_close(trained_tensors(again), trained_tensors(model), rtol=0, atol=0)
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")) < 3.1 * 4 * sum(
        t.numel() for t in kept[0].values()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_type_of_weights(tmp_path, dtype):
    def fresh(seed):
        torch.manual_seed(seed)
        model = nn.Linear(5, 3).to(dtype)
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = fresh(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for key, extra in {"codes": torch.arange(7, dtype=torch.uint8), "scale": torch.tensor([2.5])}.items():
        optimizer.state[model.weight][key] = extra
    checkpoints(tmp_path).save(model, optimizer, {"step": 1}, wait=True)
    again, its_optimizer = fresh(1)

    def made(*_):  # as an optimizer that keeps more
        its_optimizer.state[again.weight] |= {"codes": torch.zeros(7, dtype=torch.uint8), "scale": torch.zeros(1)}

    its_optimizer.register_step_post_hook(made)
    checkpoints(tmp_path).restore(again, its_optimizer)
    torch.testing.assert_close(dict(again.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)
    torch.testing.assert_close(states(its_optimizer), states(optimizer), rtol=0, atol=0)


def test_an_alpha_that_a_schedule_moves_is_kept(tiny_model, tmp_path):
    from controlllm.control.schedule import mark_scheduled

    ramp = ControlConfig.model_validate(
        {"num_expanded": 2, "train_alpha": False, "alpha_schedule": {"kind": "linear", "final": 0.9}}
    )
    model = expand_model(tiny_model, ControlSettings.resolve(ramp, num_layers=4)).train()
    mark_scheduled(model, ramp)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    alphas = [p for name, p in model.named_parameters() if name.endswith("alpha_logit")]
    for alpha in alphas:
        alpha.data.fill_(0.7)
    checkpoints(tmp_path).save(model, optimizer, {"step": 1}, wait=True)  # before the optimizer has made any state
    for alpha in alphas:
        alpha.data.zero_()
    checkpoints(tmp_path).restore(model, optimizer)
    assert [alpha.item() for alpha in alphas] == [pytest.approx(0.7)] * 2
    assert not optimizer.state


def test_an_empty_folder_has_none(tmp_path):
    assert restored(tmp_path) is restored(tmp_path / "none") is None
    assert checkpoints(tmp_path).restore_best(small()[0]) is None


# What is kept


def test_the_newest_the_multiples_and_the_best_are_kept(tmp_path):
    write(tmp_path, *range(1, 12), best=(3, 5), keep=2, keep_every=4)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (4, 5, 8, 10, 11)]
    model, _ = small(-1)
    assert checkpoints(tmp_path).restore_best(model)["step"] == value(model) == 5
    assert restored(tmp_path) == (11, 11)


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    store = write(tmp_path, 1, 2)
    store.save(*small(7), {"step": 2}, best=True, wait=True)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert restored(tmp_path) == (2, 7)


def test_what_a_killed_process_left_is_cleared(tmp_path):
    write(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / ".step-00000003.partial")
    shutil.copytree(tmp_path / "step-00000002", tmp_path / ".step-00000001.removed")
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.replaced")  # killed before the new one came
    assert restored(tmp_path) == (2, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    write(tmp_path, 1, 2, 9, keep=3)
    (tmp_path / "step-00000009" / MANIFEST).unlink()
    store, (model, optimizer) = checkpoints(tmp_path, keep=2), small()
    assert store.restore(model, optimizer)["step"] == 2
    store.save(*small(3), {"step": 3}, wait=True)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


# What cannot be written


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["weight", "state"])
def test_what_is_not_finite_is_never_published(tmp_path, bad, where):
    store = write(tmp_path, 1)
    model, optimizer = small(2)
    broken = model[1].weight.data if where == "weight" else optimizer.state[model[1].weight]["exp_avg_sq"]
    broken[0, 3] = bad
    store.save(model, optimizer, {"step": 2})
    with pytest.raises(UserError, match=r"1.weight.*' has values that are not finite, so no checkpoint is written"):
        store.wait()
    assert not store.failed()
    assert names(tmp_path) == ["step-00000001"]
    store.save(*small(3), {"step": 3}, wait=True)
    assert restored(tmp_path) == (3, 3)


def test_an_error_in_the_background_is_known_at_once_and_raised_by_the_next_save(tmp_path):
    store = checkpoints(tmp_path)
    store.save(*small(float("nan")), {"step": 1})
    store._thread.join()
    assert store.failed()
    with pytest.raises(UserError, match="not finite"):
        store.save(*small(2), {"step": 2})
    store.save(*small(3), {"step": 3}, wait=True)
    assert names(tmp_path) == ["step-00000003"]


def test_a_file_that_may_not_grow_is_one_line(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = write(tmp_path, 1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        with pytest.raises(UserError, match=r"step-00000002: no room for a checkpoint \(File too large\); free some"):
            store.save(*big(), {"step": 2}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert names(tmp_path) == ["step-00000001"]


@pytest.fixture
def disk(tmp_path):
    """A small one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(disk):
    store = checkpoints(disk / "run", keep=1)
    store.save(*big(), {"step": 1}, wait=True)
    (disk / "other").write_bytes(bytes(600_000))
    with pytest.raises(UserError, match=r"step-00000002: no room for a checkpoint \(No space left on device\); free"):
        store.save(*big(), {"step": 2}, wait=True)
    assert names(disk / "run") == ["step-00000001"]
    (disk / "other").unlink()
    store.save(*big(), {"step": 2}, wait=True)
    assert names(disk / "run") == ["step-00000002"]
    assert checkpoints(disk / "run").restore(*big()) == {"step": 2}


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    store = checkpoints(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"step-00000001: cannot be written \(Not a directory\); choose another train"):
        store.save(*small(), {"step": 1}, wait=True)
