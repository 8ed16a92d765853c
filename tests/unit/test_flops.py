"""The formulas' FLOPs are those that torch counts, whatever is trained and however long the documents are."""

import pytest
import torch
from families import tiny
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from controlllm.config import ControlConfig, IA3Config, LoRAConfig, MetricsConfig
from controlllm.control.cost import mean_length
from controlllm.control.expand import decoder_layers
from controlllm.control.loss import forward_with_loss
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.train import dora
from controlllm.train.adapters import add_adapters
from controlllm.train.attention import register
from controlllm.train.flops import known_peak, peak_flops, step_cost
from controlllm.train.profiling import flop_counter
from controlllm.train.twins import expand

LENGTHS = [40, 24, 16, 9]  # no two are similar enough to share a kernel call, which would be filled up
TARGETS = 50
SIZES = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 512}
register()


def base(family="Llama", **changes):
    return tiny(family, "packed", **SIZES | changes)


def expanded(model, sites, **changes):
    control = ControlConfig(num_expanded=len(sites), sites=sites, **changes)
    return expand_model(model, ControlSettings.resolve(control, num_layers=model.config.num_hidden_layers))


def partial(model, blocks):
    model.requires_grad_(False)
    for block in blocks:
        decoder_layers(model.base_model)[block].requires_grad_(True)
    return model


def lora(model, targets):
    peft = pytest.importorskip("peft", reason="LoRA needs peft, of the extra quant")
    model.requires_grad_(False)
    return peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=targets), model)


def adapted(model, adapter, sites=None, **control):
    """In the model's blocks, or in twins that share their weights."""
    if sites is None:
        add_adapters(model, adapter, seed=0)
        return model
    expand(model, ControlConfig(num_expanded=len(sites), sites=sites, twin="lora", **control), adapter, seed=0)
    return model


def counted(model) -> float:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (1, sum(LENGTHS)), generator=generator)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    labels = torch.full_like(ids, -100)
    wanted = torch.randperm(sum(LENGTHS) - 1, generator=generator)[:TARGETS] + 1
    labels[0, wanted] = ids[0, wanted]
    places = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with flop_counter() as counter, sdpa_kernel(SDPBackend.MATH):
        out = forward_with_loss(
            model, ids, labels=labels, position_ids=places, cu_seq_lens_q=starts.int(), use_cache=False
        )
        assert out.loss is not None
        out.loss.backward()
    return counter.get_total_flops()


CASES = {
    "full": lambda: base(),
    "full, tied": lambda: base(tie_word_embeddings=True),
    "partial": lambda: partial(base(), [2, 4]),
    "control": lambda: expanded(base(), [1, 3, 5]),
    "control top": lambda: expanded(base(), [4, 5], divergence="cosine"),
    "stack": lambda: expanded(base(), [2, 4], layout="stack"),
    "hybrid": lambda: expanded(base(), [2, 4], layout="hybrid", interpolation="dlerp"),
    "trajectory": lambda: expanded(base(), [2, 4], teacher="trajectory"),
    "lora": lambda: lora(base(), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "lora of attention's output": lambda: lora(base(), ["o_proj"]),
    "lora of the MLP": lambda: lora(base(), ["gate_proj", "up_proj", "down_proj"]),
    "lora of the last map": lambda: lora(base(), ["down_proj"]),
    "dora": lambda: adapted(base(), LoRAConfig(rank=4, dora=True)),
    "ia3": lambda: adapted(base(), IA3Config()),
    "ia3 of the last map": lambda: adapted(base(), IA3Config(target_modules=["down_proj"])),
    "twins with lora": lambda: adapted(base(), LoRAConfig(rank=4), [1, 3, 5]),
    "twins with dora in the MLP": lambda: adapted(
        base(), LoRAConfig(rank=4, dora=True, target_modules=["up_proj"]), [2, 4], divergence="cosine"
    ),
    "twins with ia3": lambda: adapted(base(), IA3Config(), [4, 5]),
    "twins with ia3 alone": lambda: adapted(base(), IA3Config(), [4, 5], interpolation="none"),
    "experts": lambda: base("Mixtral", num_experts_per_tok=2),
    "control with experts": lambda: expanded(base("Mixtral", num_experts_per_tok=2), [3, 5]),
    "Qwen3": lambda: expanded(base("Qwen3"), [3, 5]),
    "Phi3, fused maps": lambda: base("Phi3"),
    "SmolLM3": lambda: base("SmolLM3"),
}


@pytest.mark.parametrize("case", CASES)
def test_useful_flops_are_those_that_torch_counts(case, monkeypatch):
    # Products of the weights alone, which many tokens outweigh.
    monkeypatch.setattr(dora, "adapted_lengths", lambda weight, *_: dora.row_lengths(weight))
    model = CASES[case]()
    cost = step_cost(model.train())
    assert cost is not None
    assert cost.step(LENGTHS, targets=TARGETS, causal=False) == pytest.approx(counted(model), rel=0.01)


def test_documents_of_several_processes_add_up():
    cost = step_cost(expanded(base(), [3]))
    assert cost is not None
    parts = cost.step([40, 9], targets=20) + cost.step([24, 16], targets=30)
    assert parts == pytest.approx(cost.step(LENGTHS, targets=TARGETS), rel=1e-12)


def test_a_window_hides_the_pairs_that_a_mask_hides():
    for length, window in [(5, 8), (8, 8), (9, 8), (40, 8)]:
        seen = sum(min(token + 1, window) for token in range(length))
        corner = min(length, window) / 2  # length² / 2 is half a diagonal short
        assert mean_length([length], window=window) * length / 2 == pytest.approx(seen - corner)
    plain, windowed = step_cost(base()), step_cost(base("Mistral", sliding_window=8))
    assert plain is not None
    assert windowed is not None
    assert windowed.step(LENGTHS, targets=TARGETS) < plain.step(LENGTHS, targets=TARGETS)
    assert windowed.step([8], targets=2) == plain.step([8], targets=2)


def test_a_model_that_the_formulas_do_not_describe_has_no_figure():
    model = base()
    decoder_layers(model.base_model)[2].mlp.down_proj = nn.Linear(96, 32)
    assert step_cost(model) is None
    model = base()
    model.config.kv_lora_rank = 8
    assert step_cost(model) is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", None), ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500), ("AMD Instinct MI300X", 1307.4), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_known_devices(name, tflops):
    assert known_peak(name, "bf16") == (None if tflops is None else tflops * 1e12)
    assert known_peak(name, "float32") is None


def test_float8_doubles_what_a_device_with_float8_can():
    assert known_peak("NVIDIA H200", "float8") == 2 * 989.4e12
    assert known_peak("NVIDIA A100-SXM4-80GB", "float8") is None


def test_the_setting_says_it_where_the_name_does_not():
    cpu = torch.device("cpu")
    assert peak_flops(cpu, "bf16", MetricsConfig()) is None
    assert peak_flops(cpu, "float32", MetricsConfig(peak_tflops=0.5)) == 5e11
