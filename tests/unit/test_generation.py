"""Answers written while training: greedy decoding, whatever the kernel; and their scores in every script."""

import copy

import pytest
import torch
from conftest import tiny_config
from held_back import CHATS, perturb, row_of, three_rows, trained, validation
from hypothesis import given
from hypothesis import strategies as st

from controlllm.config import GenerateConfig, ValidationConfig
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.data.catalog import assistant, user
from controlllm.data.render import chat_text
from controlllm.errors import UserError
from controlllm.train.generation import questions_of, rouge, words

ANSWERS = ValidationConfig(generate=GenerateConfig(max_new_tokens=12, batch_size=3))


@pytest.fixture
def rows(tokenizer):
    return three_rows(tokenizer)


@pytest.fixture
def talker():
    """A random model that answers in letters, now and then ends its turn, and would rather sample."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny_config(initializer_range=0.3))
    letters = [i for i in range(258) if i == 1 or 66 <= i < 92]
    with torch.no_grad():
        model.lm_head.weight[[i for i in range(258) if i not in letters]] = 0
    model.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=3.0)
    return trained(expand_model(model, ControlSettings(sites=[1, 3])))


def test_questions_are_what_the_template_asks(rows, tokenizer):
    special = set(tokenizer.all_special_ids)
    questions = questions_of(rows, special=special, items=10)
    assert [tokenizer.decode(q.reference) for q in questions] == [answer for _, answer in CHATS]
    want = [chat_text([user(question)], tokenizer, prompt=True) for question, _ in CHATS]
    assert [tokenizer.decode(q.prompt) for q in questions] == want
    assert {q.end for q in questions} == {tokenizer.eos_token_id}
    assert questions_of(rows, special=special, items=2) == questions[:2]


def test_the_first_answer_of_many_and_none_of_a_cut_conversation(tokenizer):
    talk = row_of(tokenizer, [user("a"), assistant("b"), user("c"), assistant("d")])
    [question] = questions_of([talk], special=set(tokenizer.all_special_ids), items=9)
    assert tokenizer.decode(question.reference) == "b"
    first = int(talk["target"].argmax())
    inside = {name: talk[name][first:] for name in ("input_ids", "target")} | {"lengths": talk["lengths"] - first}
    assert questions_of([inside], special=set(), items=9) == []  # begins within an answer: nothing was asked
    silent = row_of(tokenizer, [user("a"), assistant("b")])
    silent["target"] &= silent["input_ids"] == tokenizer.eos_token_id
    assert questions_of([silent], special=set(tokenizer.all_special_ids), items=9) == []


@torch.no_grad()
def greedy(model, prompt, tokens, stop):
    """Without cache, batch or padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens and ids[-1] != stop:
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return [token for token in ids[len(prompt) :] if token != stop]


def test_answers_are_greedy_decoding(rows, tokenizer, talker):
    perturb(talker)
    plain = copy.deepcopy(talker).eval()
    plain.config._attn_implementation = "eager"
    questions = questions_of(rows, special=set(tokenizer.all_special_ids), items=9)
    want = [tokenizer.decode(greedy(plain, q.prompt, 12, tokenizer.eos_token_id)) for q in questions]
    made = validation(talker, ANSWERS, rows=rows, tokenizer=tokenizer)
    metrics = made.run()
    samples = made.samples()
    assert [sample["answer"] for sample in samples] == want
    assert len(set(want)) > 1
    assert all(want)
    assert [sample["reference"] for sample in samples] == [answer for _, answer in CHATS]
    assert samples[0]["prompt"].startswith("<|im_start|>user\none and one?")
    assert metrics["generated_items"] == 4
    assert talker.config._attn_implementation == "packed"
    assert talker.generation_config.temperature == 2.0
    assert talker.training
    assert talker.config.use_cache is False


def test_a_model_that_gives_the_references_scores_full(tokenizer, talker):
    chats = [[user(question), assistant("z")] for question, _ in CHATS]
    first = validation(talker, ANSWERS, rows=[row_of(tokenizer, *chats)], tokenizer=tokenizer)
    first.run()
    own = [[chat[0], assistant(sample["answer"])] for chat, sample in zip(chats, first.samples(), strict=True)]
    metrics = validation(talker, ANSWERS, rows=[row_of(tokenizer, *own)], tokenizer=tokenizer).run()
    assert {name: metrics[name] for name in ("rouge1", "rougeL", "rougeLsum")} == {
        "rouge1": 1,
        "rougeL": 1,
        "rougeLsum": 1,
    }


def test_bleu_of_the_corpus_in_chinese(rows, tokenizer, talker, monkeypatch):
    from sacrebleu import corpus_bleu

    config = ValidationConfig(generate=GenerateConfig(max_new_tokens=2, bleu_tokenize="zh"))
    made = validation(talker, config, rows=rows, tokenizer=tokenizer)
    answers, references = (
        ["我们今天去学校学习", "你好", "早上好", "再见"],
        ["我们今天去学校上课", "你好吗", "早上好", "再见"],
    )
    texts = iter([*answers, *references])
    monkeypatch.setattr(made.generation, "_text", lambda ids: next(texts))
    metrics = made.run()
    assert metrics["bleu"] == corpus_bleu(answers, [references], tokenize="zh").score > 50
    assert 0.5 < metrics["rouge2"] < metrics["rouge1"] < 1


def test_what_bleu_needs_is_said(rows, tokenizer, talker, monkeypatch):
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ja_mecab.MeCab", None)
    config = ValidationConfig(generate=GenerateConfig(bleu_tokenize="ja-mecab"))
    with pytest.raises(UserError, match=r"bleu_tokenize ja-mecab needs .*sacrebleu\[ja\]"):
        validation(talker, config, rows=rows, tokenizer=tokenizer)


def test_no_conversation_is_said_once(tokenizer, talker, capsys):
    config = ValidationConfig(generate=GenerateConfig())
    made = validation(talker, config, rows=[row_of(tokenizer, "text", "more")], tokenizer=tokenizer)
    assert set(made.run()) == set(made.run()) == {"validation_loss", "validation_perplexity"}
    assert made.samples() == []
    assert capsys.readouterr().err.count("no conversation in the held-back rows") == 1


def test_more_new_tokens_than_positions(rows, tokenizer, talker):
    with pytest.raises(UserError, match=r"max_new_tokens 2048: the model has only 2048 positions"):
        validation(
            talker, ValidationConfig(generate=GenerateConfig(max_new_tokens=2048)), rows=rows, tokenizer=tokenizer
        )


@given(st.text(st.characters(max_codepoint=126)))
def test_words_of_ascii_are_rouge_scores_own(text):
    from rouge_score.tokenize import tokenize

    assert words(text) == tokenize(text, None)


@pytest.mark.parametrize(("text", "want"), [
    ("我们去 school。", ["我", "们", "去", "school"]),
    ("カタカナabc", ["カ", "タ", "カ", "ナ", "abc"]),
    ("한국어 문장", ["한국어", "문장"]),
    ("Straße, ÉTÉ!", ["straße", "été"]),
    ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
    ("ที่นี่", ["ที่", "นี่"]),
    ("don't x_y 3.5", ["don", "t", "x", "y", "3", "5"]),
])  # fmt: skip
def test_words_of_other_scripts(text, want):
    assert words(text) == want


def test_rouge_by_hand():
    scores = rouge(["the cat sat\non the mat", "a b"], ["the cat", "c"])
    assert scores["rouge1"] == pytest.approx((2 * 1 * (2 / 6) / (1 + 2 / 6) + 0) / 2)
    assert scores["rouge2"] == pytest.approx((2 * 1 * (1 / 5) / (1 + 1 / 5) + 0) / 2)
