"""Whatever saves work changes no number and no text that lm-evaluation-harness's own model gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from controlllm.benchmark.beginnings import common_start, in_batches
from controlllm.benchmark.decode import decode
from controlllm.benchmark.engine import Prompt
from controlllm.benchmark.harness import TokenLM
from controlllm.benchmark.hf_engine import HFEngine
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError

TEXTS = ["one two three", "a", "Once upon a time there was a king who had no bread, and so he went to sea.", "42"]


def ours(model, tokenizer, batch_size=3, done=None):
    tell = lambda n, note="": None if done is None else done.append(n)  # noqa: E731
    return TokenLM(HFEngine(model, tokenizer, batch_size), tokenizer, model.config, tell)


def theirs(model, tokenizer, **settings):
    return huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, **settings)


def ask(kind, *arguments):
    return Instance(kind, {}, arguments, 0)


def windowed():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2}
    kinds = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 32}
    ids = {"vocab_size": 258, "eos_token_id": 1, "pad_token_id": 1, "bos_token_id": None}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **kinds, **ids, num_key_value_heads=1)).eval()


@pytest.fixture(params=["plain", "control", "windowed"])
def model(request, tiny_model):
    if request.param == "windowed":
        return windowed()
    if request.param == "plain":
        return tiny_model
    expanded = expand_model(tiny_model, ControlSettings(sites=[1, 3])).eval()
    with torch.no_grad():
        for parameter in expanded.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return expanded


def test_same_answers_as_the_harness(model, tokenizer):
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(2, 258, (n,), generator=generator).tolist()  # noqa: E731
    questions = [ids(n) for n in (5, 1, 30, 12)]
    requests = [(("q", "a"), question, ids(n)) for question in questions for n in (1, 7, 3)]
    requests += [((None), ids(1), ids(40))]
    done = []
    found = ours(model, tokenizer, done=done)._loglikelihood_tokens(requests)
    expected = theirs(model, tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [hit for _, hit in found] == [hit for _, hit in expected]
    assert [chance for chance, _ in found] == pytest.approx([chance for chance, _ in expected], abs=1e-4)
    assert done[-1] == len(requests)


def test_examples_before_all_questions_are_run_once_and_change_nothing(model, tokenizer):
    lm, peer = ours(model, tokenizer, batch_size=2), theirs(model, tokenizer)
    shots = "Q: how many legs has a horse? A: four. Q: and a bird? A: two. Q: "
    pairs = [ask("loglikelihood", shots + text, end) for text in TEXTS for end in (" yes", "n")]
    pairs += [ask("loglikelihood", shots, "so"), ask("loglikelihood", "else", " what")]
    found, expected = lm.loglikelihood(pairs), peer.loglikelihood(pairs, disable_tqdm=True)
    assert [chance for chance, _ in found] == pytest.approx([chance for chance, _ in expected], abs=1e-4)
    generated = [ask("generate_until", shots + text, {"until": ["\n"], "max_gen_toks": 12}) for text in TEXTS]
    assert lm.generate_until(generated) == peer.generate_until(generated, disable_tqdm=True)
    assert common_start([tokenizer.encode(request.args[0]) for request in generated]) == len(shots)


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=30), st.integers(1, 5))
def test_every_text_is_in_one_batch(texts, batch_size):
    batches = in_batches(texts, batch_size)
    assert sorted(place for batch in batches for place in batch) == list(range(len(texts)))
    assert all(0 < len(batch) <= batch_size for batch in batches)


@pytest.mark.parametrize("length", [16, 2048])
def test_same_texts_and_windows_as_the_harness(model, tokenizer, length):
    model.config.max_position_embeddings = length
    lm, peer = ours(model, tokenizer), theirs(model, tokenizer)
    rolling = [ask("loglikelihood_rolling", text) for text in TEXTS]
    assert lm.loglikelihood_rolling(rolling) == pytest.approx(
        peer.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-4
    )
    pairs = [ask("loglikelihood", text, end) for text in (*TEXTS, "", "<|im_end|>x ") for end in (" yes", " no way")]
    found, expected = lm.loglikelihood(pairs), peer.loglikelihood(pairs, disable_tqdm=True)
    assert [chance for chance, _ in found] == pytest.approx([chance for chance, _ in expected], abs=1e-4)
    until = [{"until": ["<|im_end|>", "\n"], "max_gen_toks": 12}, {"until": [], "max_gen_toks": 5}]
    generated = [ask("generate_until", text, settings) for text in TEXTS for settings in until]
    assert lm.generate_until(generated) == peer.generate_until(generated, disable_tqdm=True)


def test_stop_words_end_a_text_before_them(tiny_model, tokenizer):
    lm = ours(tiny_model, tokenizer)
    whole = lm.generate_until([ask("generate_until", text, {"max_gen_toks": 24}) for text in TEXTS])
    words = [text[6:9] for text in whole]
    assert all(words)
    asked = [
        ask("generate_until", text, {"until": [word], "max_gen_toks": 24})
        for text, word in zip(TEXTS, words, strict=True)
    ]
    assert lm.generate_until(asked) == [text.split(word)[0] for text, word in zip(whole, words, strict=True)]
    made = decode(tiny_model, tokenizer, [Prompt(tokenizer.encode(TEXTS[0]), 24, until=[words[0]])], shared=True)
    assert len(made[0]) < 24


def test_samples_do_not_depend_on_the_batch(tiny_model, tokenizer):
    sampled = {"temperature": 1.5, "top_p": 0.9, "top_k": 50}
    prompts = [Prompt(tokenizer.encode(text), 8, seed=seed, **sampled) for text in TEXTS for seed in (0, 1)]
    together = decode(tiny_model, tokenizer, prompts, shared=True)
    assert together == [decode(tiny_model, tokenizer, [prompt], shared=True)[0] for prompt in prompts]
    assert len({tuple(made) for made in together}) == len(prompts)


def test_repeated_samples_of_a_prompt_differ(tiny_model, tokenizer):
    request = ask("generate_until", "one", {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8})
    first, second = ours(tiny_model, tokenizer).generate_until([request] * 2)
    assert first != second


@pytest.mark.parametrize("opened", [True, False])
def test_chats_are_the_harness_s(tiny_model, tokenizer, opened):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So"}][: 1 if opened else 2]
    lm, peer = ours(tiny_model, tokenizer), theirs(tiny_model, tokenizer)
    assert lm.apply_chat_template(chat, opened) == peer.apply_chat_template(chat, opened)
    assert lm.tokenizer_name == peer.tokenizer_name
    assert lm.chat_template(True) == peer.chat_template(True)


def test_a_text_longer_than_the_model_is_refused(tiny_model, tokenizer):
    with pytest.raises(UserError, match="generates up to 4096 tokens, but the model's length is 2048"):
        ours(tiny_model, tokenizer).generate_until([ask("generate_until", "x", {"max_gen_toks": 4096})])
