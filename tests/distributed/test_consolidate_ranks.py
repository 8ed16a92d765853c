"""Checkpoints that several processes wrote, with DeepSpeed and FSDP themselves, become one model."""

import os
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_saver as torch_dcp
from conftest import tiny_config
from prior_checkpoints import prior_checkpoint
from ranks import run
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from controlllm.consolidate.foreign import export
from controlllm.control.model import family
from controlllm.control.reference import import_reference, prior_name
from controlllm.errors import UserError

pytestmark = pytest.mark.distributed


def whole(model):
    return {name: tensor.detach().float().numpy().copy() for name, tensor in model.state_dict().items()}


def zero(world, base, folder):
    """Stages 1, 2, 3, with and without frozen blocks, after a step; what the weights are then."""
    import deepspeed

    from controlllm.train.zero import start_deepspeed

    start_deepspeed()
    os.environ["DS_SKIP_CUDA_CHECK"] = "1"
    found = {}
    for stage in (1, 2, 3):
        for frozen in (False, True):
            model = AutoModelForCausalLM.from_pretrained(base)
            for name, parameter in model.named_parameters():
                parameter.requires_grad = not (frozen and "layers.1." in name)
            settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
            trained = [p for p in model.parameters() if p.requires_grad]
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=torch.optim.AdamW(trained, lr=1e-2),
                config=settings | {"zero_allow_untested_optimizer": True, "bf16": {"enabled": stage == 2}},
            )  # fmt: skip
            ids = torch.arange(2, 20)[None] + world.rank
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            name = f"zero{stage}-{frozen}"
            engine.save_checkpoint(f"{folder}/{name}", tag="global_step1")
            if stage == 3:
                with deepspeed.zero.GatheredParameters(list(model.parameters())):
                    found[name] = whole(model)
            elif stage == 1:
                found[name] = whole(model)
            dist.barrier()
    return found


@pytest.fixture(scope="module")
def written(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    return folder, run(zero, 2, str(tiny_base), str(folder))[0]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(written, tiny_base, tmp_path, stage, frozen):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder, weights = written
    source = folder / f"zero{stage}-{frozen}"
    made = AutoModelForCausalLM.from_pretrained(export(source, tmp_path / "out", base=tiny_base)).state_dict()
    for name, tensor in (get_fp32_state_dict_from_zero_checkpoint(str(source)) or {}).items():
        assert torch.equal(made[name], tensor.float()), name
    for name, tensor in weights.get(source.name, {}).items():
        np.testing.assert_array_equal(made[name].numpy(), tensor, err_msg=name)
    assert not torch.equal(
        made["model.embed_tokens.weight"], load_file(tiny_base / "model.safetensors")["model.embed_tokens.weight"]
    )


def test_a_missing_process_is_named(written, tiny_base, tmp_path):
    source = tmp_path / "half"
    shutil.copytree(written[0] / "zero3-False", source)
    (lost,) = source.glob("*/*pp_rank_1_*_optim_states.pt")
    lost.unlink()
    with pytest.raises(UserError, match=rf"{lost.name}: not found, but 2 processes wrote"):
        export(source, tmp_path / "out", base=tiny_base)
    (source / "latest").write_text("global_step9")
    with pytest.raises(UserError, match=r"global_step9: not found, but .*latest names it"):
        export(source, tmp_path / "out", base=tiny_base)


def sharded(world, base, folder):
    """torch's older FSDP, over all parameters of a block in one flat tensor."""
    model = AutoModelForCausalLM.from_pretrained(base)
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT):
        torch_dcp.save({"model": wrapped.state_dict()}, checkpoint_id=str(folder))


def test_fsdp1(tmp_path):
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "base")
    run(sharded, 2, str(tmp_path / "base"), str(tmp_path / "fsdp"))
    assert len(list((tmp_path / "fsdp").glob("*.distcp"))) == 2
    made = AutoModelForCausalLM.from_pretrained(export(tmp_path / "fsdp", tmp_path / "out", base=tmp_path / "base"))
    for name, tensor in load_file(tmp_path / "base" / "model.safetensors").items():
        assert torch.equal(made.state_dict()[name], tensor), name


def prior(world, imported, folder):
    """The same of an expanded model, under the prior implementation's names."""
    model = AutoModelForCausalLM.from_pretrained(imported)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT):
        state = {prior_name(name, model.config.control): t for name, t in wrapped.state_dict().items()}
    torch_dcp.save({"model": state}, checkpoint_id=str(folder))


def test_the_prior_implementations_sharded_checkpoint(tmp_path):
    source = prior_checkpoint(tmp_path / "prior", method="dlerp", interpolation_norm_alpha=-1)
    imported = import_reference(source, tmp_path / "imported")
    run(prior, 2, str(imported), str(tmp_path / "fsdp"))
    made = AutoModelForCausalLM.from_pretrained(export(tmp_path / "fsdp", tmp_path / "out", base=source))
    assert isinstance(made, family("llama").causal_lm)
    for name, tensor in AutoModelForCausalLM.from_pretrained(imported).state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor), name
