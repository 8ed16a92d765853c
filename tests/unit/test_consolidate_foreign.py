"""Checkpoints of other trainers become Hugging Face models; half and hostile ones, and of other models, do not."""

import os
import pickle
import shutil
import zipfile

import pytest
import torch
import torch.distributed.checkpoint.state_dict_saver as torch_dcp
from delivering import loaded, perturbed
from prior_checkpoints import prior_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from controlllm.cli import main
from controlllm.config import CheckpointConfig, ExportConfig
from controlllm.consolidate.foreign import export
from controlllm.consolidate.pickles import read_pickle, read_torch
from controlllm.consolidate.tensors import read
from controlllm.control.reference import import_reference
from controlllm.errors import UserError
from controlllm.store import run_stage, stage_inputs
from controlllm.train.checkpoint import Checkpoints
from controlllm.train.distributed import World


def same(folder, model, **kwargs):
    again = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    return again


def save_dcp(state, folder):
    torch_dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    return folder


@pytest.fixture
def tuned(tiny_base):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("state", [lambda s: s, lambda s: {"model": s, "optim": {"step": torch.ones(1)}, "epoch": 3}])
def test_dcp(tiny_base, tmp_path, tuned, state):
    source = save_dcp(state(tuned.state_dict()), tmp_path / "dcp")
    same(export(source, tmp_path / "out", base=tiny_base), tuned)
    half = export(source, tmp_path / "half", base=tiny_base, how=ExportConfig(dtype="bfloat16"))
    same(half, tuned.to(torch.bfloat16))


def test_dcp_of_some_tensors_takes_the_others_from_the_base(tiny_base, tmp_path):
    model = perturbed(loaded(tiny_base, partial={"num_blocks": 1}))
    source = save_dcp({n: p.data for n, p in model.named_parameters() if p.requires_grad}, tmp_path / "dcp")
    same(export(source, tmp_path / "out", base=tiny_base), model)
    shutil.copy(tiny_base / "config.json", source)
    with pytest.raises(UserError, match=r"dcp: tensor 'model.embed_tokens.weight' is not in it, and no --base"):
        export(source, tmp_path / "other")


def test_dcp_of_an_expanded_model(tiny_base, tmp_path):
    model = perturbed(loaded(tiny_base, control={"num_expanded": 2}))
    own = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    source = save_dcp({"model": own}, tmp_path / "dcp")
    model.config.save_pretrained(source)
    same(export(source, tmp_path / "out", base=tiny_base), model)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    folded = export(source, tmp_path / "folded", base=tiny_base, how=ExportConfig(form="folded"))
    assert type(AutoModelForCausalLM.from_pretrained(folded)) is LlamaForCausalLM


@pytest.mark.parametrize("method", ["lerp", "proj", "moe"])
def test_the_prior_implementations(tmp_path, method):
    prior = prior_checkpoint(tmp_path / "prior", method=method)
    source = save_dcp({"model": load_file(prior / "model.safetensors")}, tmp_path / "fsdp")
    want = AutoModelForCausalLM.from_pretrained(import_reference(prior, tmp_path / "imported"))
    shutil.copy(prior / "config.json", source)
    same(export(source, tmp_path / "out"), want)


@pytest.mark.parametrize(("kind", "settings"), [
    ("LoraConfig", {"r": 4, "lora_alpha": 12, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
])  # fmt: skip
def test_peft(tiny_base, tmp_path, kind, settings):
    import peft

    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
    model = perturbed(model)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(2, 40)[None]
    want = model(ids).logits
    made = AutoModelForCausalLM.from_pretrained(export(tmp_path / "adapter", tmp_path / "out", base=tiny_base))
    torch.testing.assert_close(made(ids).logits, want, atol=1e-5, rtol=1e-5)
    wrong = tmp_path / "wrong"
    LlamaForCausalLM(base.config.__class__(**{**base.config.to_dict(), "intermediate_size": 32})).save_pretrained(wrong)
    with pytest.raises(UserError, match=r"adapter: does not fit .*size mismatch"):
        export(tmp_path / "adapter", tmp_path / "other", base=wrong)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors: not found"):
        export(tmp_path / "adapter", tmp_path / "other", base=tiny_base)


@pytest.fixture
def run(tiny_base, tmp_path, store):
    """`run(**method)`: the model, and the folder of its checkpoints, with its base in the store."""

    def make(**method):
        model = perturbed(loaded(tiny_base, **method))
        made = run_stage("ingest model", config={}, parents={}, build=lambda f: shutil.copytree(
            tiny_base, f, dirs_exist_ok=True))  # fmt: skip
        identity = stage_inputs("train", config=method, parents={"ingest model": made.path})
        place = tmp_path / "checkpoints"
        checkpoints = Checkpoints(place, CheckpointConfig(), world=World(), identity=identity)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        checkpoints.save(model, optimizer, {"step": 3}, wait=True)
        return model, place

    return make


@pytest.mark.parametrize("method", [
    {"control": {"num_expanded": 2, "layout": "hybrid", "interpolation": "dlerp"}}, {"partial": {"num_blocks": 1}}, {},
])  # fmt: skip
def test_a_run_that_is_not_finished(run, tmp_path, method):
    model, place = run(**method)
    same(export(place, tmp_path / "out"), model)
    same(export(place / "step-00000003", tmp_path / "again"), model)
    assert {file.name for file in (tmp_path / "out").iterdir() if file.suffix not in (".json", ".safetensors")} == {
        "chat_template.jinja"
    }


def test_adapters_of_a_run_are_merged(run, tmp_path):
    model, place = run(lora={"rank": 4})
    ids = torch.arange(2, 40)[None]
    made = AutoModelForCausalLM.from_pretrained(export(place, tmp_path / "out"))
    torch.testing.assert_close(made(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_damaged_step_is_not_taken(run, tmp_path):
    _, place = run(partial={"num_blocks": 1})
    (shard,) = (place / "step-00000003").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"step-00000003: .*safetensors was altered"):
        export(place / "step-00000003", tmp_path / "out")
    with pytest.raises(UserError, match="none of its 1 checkpoints is whole"):
        export(place, tmp_path / "out")


def test_half_a_checkpoint_is_named(tiny_base, tmp_path, tuned):
    source = save_dcp({"model": tuned.state_dict()}, tmp_path / "dcp")
    (data,) = source.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"__0_0.distcp: ends before tensor '.*half a checkpoint"):
        export(source, tmp_path / "out", base=tiny_base)
    data.unlink()
    with pytest.raises(UserError, match=r"__0_0.distcp: not found, but .metadata names it"):
        export(source, tmp_path / "out", base=tiny_base)
    data.write_bytes(whole)
    (source / ".metadata").unlink()
    with pytest.raises(UserError, match=r"\.metadata: not found"):
        export(source, tmp_path / "out", base=tiny_base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp"]


def test_another_base_is_named(tmp_path, tuned):
    source, wrong = save_dcp({"model": tuned.state_dict()}, tmp_path / "dcp"), tmp_path / "wrong"
    config = {**tuned.config.to_dict(), "intermediate_size": 32}
    LlamaForCausalLM(type(tuned.config).from_dict(config)).save_pretrained(wrong)
    with pytest.raises(UserError, match=r"tensor 'model.layers.0.mlp.*' has shape \[.*96.*\], .* makes it \[.*32"):
        export(source, tmp_path / "out", base=wrong)


class Runs:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_nothing_in_a_pickle_is_run(tiny_base, tmp_path, tuned):
    proof = tmp_path / "ran"
    source = save_dcp({"model": tuned.state_dict()}, tmp_path / "dcp")
    (source / ".metadata").write_bytes(pickle.dumps(Runs(proof)))
    with pytest.raises(UserError, match=r"\.metadata: asks for posix\.system, .* may run code"):
        export(source, tmp_path / "out", base=tiny_base)
    zero = tmp_path / "zero"
    zero.mkdir()
    for name in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"):
        torch.save({"optimizer_state_dict": Runs(proof)}, zero / name)
    with pytest.raises(UserError, match=r"optim_states.pt: asks for posix\.system"):
        export(zero, tmp_path / "out", base=tiny_base)
    for said in (
        b"cbuiltins\neval\n(V1\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"ctorch\nos.system\n.",
        b"csubprocess\nrun\n.",
    ):
        (tmp_path / "x.pkl").write_bytes(said)
        with pytest.raises(UserError, match="may run code"):
            read_pickle(tmp_path / "x.pkl")
    assert not proof.exists()


def test_objects_of_libraries_are_read_without_being_made(tmp_path):
    from argparse import Namespace

    torch.save(
        {"t": torch.arange(6.0).reshape(2, 3)[1:], "n": Namespace(a=1), "s": torch.nn.Linear(2, 2)}, tmp_path / "f"
    )
    found = read_torch(tmp_path / "f")
    assert torch.equal(read(found["t"]), torch.tensor([[3.0, 4.0, 5.0]]))
    assert not isinstance(found["n"], Namespace)
    assert not isinstance(found["s"], torch.nn.Module)
    packed = tmp_path / "packed"
    with zipfile.ZipFile(tmp_path / "f") as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made:
        for info in whole.infolist():
            made.writestr(info.filename, whole.read(info))
    with pytest.raises(UserError, match="compressed or cut off"):
        read_torch(packed)
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"no whole file of torch\.save"):
        read_torch(packed)


@pytest.mark.parametrize(("source", "target", "says"), [
    ("nowhere", "out", "nowhere: no such directory; give a run of controlllm"),
    ("empty", "out", "empty: is no checkpoint that is known here; give a run of controlllm"),
    ("empty", "empty/in", "empty/in: lies inside the checkpoint"),
    ("empty", "full", "full: exists and is not empty"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, capsys, source, target, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["consolidate", str(tmp_path / source), str(tmp_path / target)]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("args", "says"), [
    (["--dtype", "int3"], "--dtype: "), (["--alpha", "x"], "--alpha: 'x' is neither"), (["--alpha", "0.5"], "folded"),
    (["--base", "nowhere"], "--base: nowhere has no config.json"),
])  # fmt: skip
def test_options(tmp_path, capsys, args, says):
    (tmp_path / "some").mkdir()
    assert main(["consolidate", str(tmp_path / "some"), str(tmp_path / "out"), *args]) == 1
    assert says in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(tiny_base, tmp_path, tuned, monkeypatch, capsys):
    source = save_dcp({"model": tuned.state_dict()}, tmp_path / "dcp")

    def full(_file, _tensors):
        yield 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("controlllm.consolidate.writing.write", full)
    assert main(["consolidate", str(source), str(tmp_path / "out"), "--base", str(tiny_base), "--copy"]) == 1
    assert "no space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]
