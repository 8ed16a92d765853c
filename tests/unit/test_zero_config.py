"""DeepSpeed's settings: what a recipe makes of them, a file of the user's own, and what cannot be."""

import json

import pytest
from packed_rows import Rows, mix_of
from pydantic import ValidationError

from controlllm.cli import main
from controlllm.config import RunConfig, TrainConfig
from controlllm.errors import UserError
from controlllm.train.distributed import World
from controlllm.train.zero_config import DECIDED, zero_config, zero_mistake


def settings(processes=8, nodes_of=None, *, train=None, **parallel):
    made = {"trainer": "transformers", "parallel": {"kind": "deepspeed"} | parallel} | (train or {})
    return zero_config(TrainConfig.model_validate(made), processes=processes, nodes_of=nodes_of)


def at(tree, dotted):
    for name in dotted.split("."):
        tree = tree.get(name, {})
    return tree


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_deepspeed_itself_takes_what_is_made(stage, offload):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    made = settings(zero_stage=stage, cpu_offload=offload)["zero_optimization"]
    read = DeepSpeedZeroConfig(**made)
    assert (read.stage, read.offload_optimizer.device) == (stage, "cpu" if offload else "none")
    assert (read.offload_param is not None) == (stage == 3)
    known = set(DeepSpeedZeroConfig.model_fields) | {f.alias for f in DeepSpeedZeroConfig.model_fields.values()}
    assert made.keys() <= known


@pytest.mark.parametrize(("processes", "rows", "micro"), [(8, 32, 1), (8, 8, 1), (2, 5, 1), (3, 8, 2), (16, 8, 1)])
def test_accumulation_is_that_of_the_loader(processes, rows, micro):
    from controlllm.train.share import Share

    train = {"global_batch_size": rows, "micro_batch_size": micro}
    made, mix = settings(processes, train=train), mix_of(Rows([]))
    rounds = Share(mix, TrainConfig.model_validate(train), World(0, processes)).rounds
    assert made["gradient_accumulation_steps"] == rounds
    assert made["train_batch_size"] == rounds * micro * processes


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_deepspeed_sees_float32(precision):
    made = settings(train={"precision": precision})
    assert not any(made[section]["enabled"] for section in ("bf16", "fp16", "torch_autocast"))
    assert made["zero_optimization"]["memory_efficient_linear"] == (precision != "float32")


def test_own_file_keeps_its_buckets_and_gets_the_rest(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({
        "train_batch_size": "auto", "gradient_clipping": 1, "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 77, "stage3_prefetch_bucket_size": "auto"},
        "comms_logger": {"enabled": True},
    }))  # fmt: skip
    own, made = settings(config=str(file)), settings()
    assert own["zero_optimization"]["reduce_bucket_size"] == 77
    assert (
        own["zero_optimization"]["stage3_prefetch_bucket_size"]
        == made["zero_optimization"]["stage3_prefetch_bucket_size"]
    )
    assert own["comms_logger"] == {"enabled": True}
    assert "allgather_bucket_size" not in own["zero_optimization"]
    assert {key: at(own, key) for key in DECIDED} == {key: at(made, key) for key in DECIDED}


def test_what_was_printed_can_be_the_own_file(tmp_path):
    file = tmp_path / "ds.json"
    made = settings(cpu_offload=True, hpz=4)
    file.write_text(json.dumps(made))
    assert settings(cpu_offload=True, hpz=4, config=str(file)) == made


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping 0.5, but by train.optimizer.max_grad_norm it is 1.0; write"),
        ({"train_batch_size": 64}, "train_batch_size 64, but by train.global_batch_size it is 8"),
        ({"bf16": {"enabled": True}}, "bf16.enabled true, but by train.precision it is false"),
        ({"zero_optimization": {"stage": 2}}, "stage 2, but by train.parallel.zero_stage it is 3"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, 'device "nvme", but by train.parallel.cpu'),
        ({"optimizer": {"type": "AdamW"}}, "has a section optimizer, but train.optimizer says it; leave it out"),
        ({"flops_profiler": {"enabled": "auto"}}, "flops_profiler.enabled is auto, but no setting"),
    ],
)  # fmt: skip
def test_own_file_against_the_recipe_is_refused(tmp_path, own, said):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(own))
    with pytest.raises(UserError) as refused:
        settings(config=str(file))
    assert said in str(refused.value)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is no JSON"), ("[]", "holds no JSON object"), (None, "cannot be read")]
)
def test_own_file_that_is_none(tmp_path, text, said):
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=said):
        settings(config=str(file))


def test_param_offload_is_of_stage_3(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"offload_param": {"device": "cpu"}}}))
    with pytest.raises(UserError, match="offload_param"):
        settings(config=str(file), zero_stage=2, cpu_offload=True)


@pytest.mark.parametrize(
    ("processes", "nodes_of", "parallel", "said"),
    [
        (16, 8, {"hpz": 5}, "hpz 5 must divide the 16 processes"),
        (8, 8, {"hpz": 8}, "leave it out on one node"),
        (8, 8, {"hpz": 1}, "hpz: 1 shares the second copy with nobody"),
        (8, 8, {"qgz": True}, "qgz reduces between nodes: it needs two or more of equal size, found 8 processes, 8 on"),
        (12, 8, {"qgz": True}, "found 12 processes, 8 on this node"),
    ],
)
def test_zero_plus_plus_needs_its_nodes(processes, nodes_of, parallel, said):
    with pytest.raises(UserError, match=said):
        settings(processes, nodes_of, **parallel)


def test_zero_plus_plus_on_two_nodes():
    made = settings(16, 8, hpz=8, qwz=True, qgz=True)
    zero = made["zero_optimization"]
    assert (zero["zero_hpz_partition_size"], zero["zero_quantized_weights"], zero["zero_quantized_gradients"]) == (
        8,
        1,
        1,
    )
    assert made["communication_data_type"] == "fp16"


def run_config(train, **sections):
    base = {
        "name": "a", "model": {"name": "b"}, "mix": {"datasets": [{"name": "puzzles"}]},
        "train": {"trainer": "transformers", "parallel": {"kind": "deepspeed"}} | train,
    }  # fmt: skip
    return RunConfig.model_validate(base | sections)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"optimizer": {"name": "adamw_8bit"}}, "train.optimizer.name: adamw_8bit does not go with train.parallel"),
        ({"precision": "float8"}, "train.precision: float8 does not go with"),
        ({"precision": "bf16_kahan"}, "train.precision: bf16_kahan does not go with"),
        ({"compile": "inductor"}, "train.compile: inductor does not go with zero_stage 3"),
        ({"activation_checkpointing": "selective"}, "train.activation_checkpointing: selective does not go with zero"),
        ({"parallel": {"kind": "deepspeed", "qwz": True}}, "train.parallel.qwz: quantises parameters in groups of 8"),
    ],
)  # fmt: skip
def test_check_refuses(train, said):
    assert (zero_mistake(run_config(train, control={})) or "").startswith(said)


def test_check_holds_the_own_file_against_the_recipe(tmp_path):
    file = tmp_path / "ds.json"
    parallel = {"parallel": {"kind": "deepspeed", "config": str(file)}}
    file.write_text(json.dumps({"gradient_clipping": 0.5}))
    with pytest.raises(UserError, match=r"gradient_clipping 0\.5, but by train\.optimizer\.max_grad_norm it is 1\.0"):
        zero_mistake(run_config(parallel))
    file.write_text(json.dumps({"train_batch_size": 64}))  # only the launcher knows whether that is right
    assert zero_mistake(run_config(parallel)) is None


def test_check_lets_the_others_be():
    assert zero_mistake(run_config({"activation_checkpointing": "full"}, control={})) is None
    stage_2 = {"compile": "inductor", "parallel": {"kind": "deepspeed", "zero_stage": 2}}
    assert zero_mistake(run_config(stage_2, control={})) is None
    assert zero_mistake(run_config({"trainer": "native", "parallel": {"kind": "fsdp"}, "precision": "float8"})) is None


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        ({"zero_stage": 2, "hpz": 4}, "hpz is of ZeRO"),
        ({"zero_stage": 4}, "zero_stage"),
        ({"frozen": "replicate"}, "frozen"),
    ],
)
def test_keys_of_another_kind_are_refused(parallel, said):
    with pytest.raises(ValidationError, match=said):
        settings(**parallel)


def test_shown(recipe, capsys):
    changes = ["train.trainer=transformers", "train.parallel.kind=deepspeed"]
    assert main(["config", "show", str(recipe), *changes, "--deepspeed", "--processes", "4"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["zero_optimization"]["stage"] == 3
    assert shown["train_batch_size"] == 4
    assert main(["config", "show", str(recipe), "--deepspeed"]) == 1
    assert "set train.parallel.kind to deepspeed" in capsys.readouterr().err
