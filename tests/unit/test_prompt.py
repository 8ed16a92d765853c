"""Virtual tokens: every document of a packed row gets what PEFT gives it alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import tiny
from lm_eval.models.huggingface import HFLM
from peft import PeftModelForCausalLM, PrefixTuningConfig, PromptTuningConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from controlllm.benchmark.harness import TokenLM
from controlllm.benchmark.hf_engine import HFEngine
from controlllm.config import PromptConfig
from controlllm.control.loss import forward_with_loss
from controlllm.data.loader import collate
from controlllm.train import attention
from controlllm.train.activations import checkpoint_activations
from controlllm.train.compiling import compile_blocks
from controlllm.train.flops import step_cost
from controlllm.train.profiling import flop_counter
from controlllm.train.prompt import add_prompt, without_virtual_tokens

KINDS = ["prompt", "prefix"]
COUNT = 3
attention.register()


def prompted(family, kind, kernel="packed", *, seed=0, **changes):
    model = tiny(family, kernel, **changes)
    model.config.use_cache = False
    add_prompt(model, PromptConfig(kind=kind, num_virtual_tokens=COUNT), seed=seed)
    return model


def packed(*lengths, vocabulary=99):
    rng = np.random.default_rng(len(lengths))
    ids = rng.integers(3, vocabulary, size=sum(lengths))
    return collate([{"input_ids": ids, "lengths": np.array(lengths), "target": rng.random(len(ids)) < 0.7}])


def documents(batch):
    edges = batch.cu_seq_lens_q.tolist()
    return [(batch.input_ids[:, a:b], batch.labels[:, a:b]) for a, b in pairwise(edges)]


def of_peft(model, kind, family):
    """PEFT's own model around another plain one of the same weights, and the same virtual tokens."""
    config = PromptTuningConfig if kind == "prompt" else PrefixTuningConfig
    made = PeftModelForCausalLM(tiny(family, "eager"), config(task_type="CAUSAL_LM", num_virtual_tokens=COUNT))
    own = made.prompt_encoder["default"].embedding.weight
    own.data.copy_(model.virtual_tokens.weight.data)
    return made, own


def summed_alone(model, batch):
    """The losses of the documents, each by itself through PEFT's model."""
    total = torch.zeros(())
    for ids, labels in documents(batch):
        logits = model(input_ids=ids).logits[:, -ids.shape[1] :]
        total = total + F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100)
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "kernel"), [
    ("Llama", "packed"), ("Llama", "sdpa"), ("Llama", "eager"), ("Qwen3", "packed"),
    ("Mistral", "packed"), ("Gemma2", "eager"), ("Gemma3Text", "sdpa"), ("Mixtral", "packed"),
])  # fmt: skip
def test_every_document_is_what_peft_computes_for_it_alone(family, kernel, kind):
    model, batch = prompted(family, kind, kernel), packed(5, 14, 1, 9)
    reference, own = of_peft(model, kind, family)
    out = forward_with_loss(model, **batch.arguments(kernel), num_items_in_batch=batch.targets)
    out.loss.backward()
    want = summed_alone(reference, batch) / batch.targets
    want.backward()
    torch.testing.assert_close(out.loss, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.virtual_tokens.weight.grad, own.grad, atol=1e-5, rtol=1e-5)
    assert own.grad.abs().max() > 1e-4
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["virtual_tokens.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_and_compiled_blocks_give_the_same(kind):
    batch, found = packed(6, 11), {}
    for way in ("plain", "full", "selective", "aot_eager"):
        model = prompted("Llama", kind).train()
        checkpoint_activations(model, way if way in ("full", "selective") else "none")
        compile_blocks(model, way if way == "aot_eager" else "none")
        forward_with_loss(model, **batch.arguments()).loss.backward()
        found[way] = model.virtual_tokens.weight.grad
    attention.register()
    for way, gradient in found.items():
        torch.testing.assert_close(gradient, found["plain"], atol=1e-6, rtol=1e-5, msg=way)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_padded_batches_and_caches_change_no_answer(family, kind):
    model = prompted(family, kind, "eager", sliding_window=64).eval()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=True, eos_token_id=None
    )
    with torch.no_grad():
        for prompt, row in zip(prompts, made[:, width:].tolist(), strict=True):
            longer = list(prompt)
            for _ in range(8):
                longer.append(model(input_ids=torch.tensor([longer])).logits[0, -1].argmax().item())
            assert row == longer[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_the_benchmark_scores_with_virtual_tokens(kind, tokenizer):
    model = prompted("Llama", kind, "sdpa", vocab_size=258, max_position_embeddings=70).eval()
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, 258, (n,), generator=generator).tolist()  # noqa: E731
    requests = [(("q", "a"), question, ids(n)) for question in (ids(5), ids(20)) for n in (1, 7, 3)]
    ours = TokenLM(HFEngine(model, tokenizer, 2), tokenizer, model.config, lambda done, note="": None)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    assert ours.max_length == theirs.max_length - COUNT
    answers = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    with without_virtual_tokens(model):
        base = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    found = [chance for chance, _ in ours._loglikelihood_tokens(requests)]
    assert found == pytest.approx([chance for chance, _ in answers], abs=1e-4)
    assert found != pytest.approx([chance for chance, _ in base], abs=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_within(kind):
    model, base, batch = prompted("Llama", kind), tiny("Llama", "packed"), packed(6, 11)
    given = {name: value for name, value in batch.arguments().items() if name != "labels"}
    with torch.no_grad(), without_virtual_tokens(model):
        assert torch.equal(model(**given).logits, base(**given, use_cache=False).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_counted_operations(kind):
    model, batch = prompted("Llama", kind), packed(40, 24, 16, 9)
    cost = step_cost(model)
    assert cost is not None
    model.train()
    with flop_counter() as counter, sdpa_kernel(SDPBackend.MATH):
        forward_with_loss(model, **batch.arguments()).loss.backward()
    lengths = batch.cu_seq_lens_q.diff().tolist()
    # Of the lowest block no gradient goes on to its queries, nor through its keys and values.
    assert cost.step(lengths, targets=batch.targets, causal=False) == pytest.approx(counter.get_total_flops(), rel=0.04)
