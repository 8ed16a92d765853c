"""Documents become the same tokens many at a time as one at a time, whatever the tokenizer."""

import pickle

import pytest
from chat_templates import CASES, TURNS, tokenizer_of, tool_conversation
from rendering import CHATML, LLAMA3, assert_same, chat, copy_of, documents, with_tools
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from controlllm.data.render import Renderer, chat_text, render
from controlllm.errors import UserError


@with_tools
def test_whole_documents_go_with_the_others(case):
    some = [chat("a", "b"), tool_conversation(case), "a text", chat("c", "d"), [{"role": "user", "content": "x"}]]
    batch = assert_same(Renderer(tokenizer_of(case)), tokenizer_of(case), *some)
    assert batch.bad == [(4, "the conversation has no answer by the assistant: nothing to learn")]


def test_another_template_takes_the_place_of_the_tokenizers():
    tokenizer = tokenizer_of(CHATML)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    template += "{{ 'assistant:' if add_generation_prompt }}"
    rows = [chat(f"a{i}", "b") for i in range(20)]
    batch = assert_same(Renderer(tokenizer, chat_template=template), tokenizer, *rows, chat_template=template)
    assert tokenizer.decode(batch.ids[: batch.offsets[1]][batch.target[: batch.offsets[1]]]) == " b<|im_end|>"


def test_no_template_is_told_before_anything_is_made():
    tokenizer = copy_of(CHATML, "")
    with pytest.raises(UserError, match="no chat template"):
        render(chat("a", "b"), tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        Renderer(tokenizer).prove(documents(chat("a", "b")))
    assert len(Renderer(tokenizer).encode(documents("text needs none"))) == 1


def test_all_tokens_can_be_targets():
    tokenizer = tokenizer_of(LLAMA3)
    rows = [chat(f"a{i}", "b") for i in range(20)]
    batch = assert_same(
        Renderer(tokenizer, targets="all"), tokenizer, *rows, [{"role": "user", "content": "x"}], targets="all"
    )
    assert batch.target.all()


def test_text_has_the_bos_of_its_tokenizer_once_and_an_eos():
    bos, eos = LLAMA3.bos, LLAMA3.eos

    def with_bos(raw):
        special = [(token, raw.token_to_id(token)) for token in (bos, eos)]
        raw.post_processor = TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=special)

    tokenizer = copy_of(LLAMA3, change=with_bos)
    some = ["plain é", *[chat("a", f"b{i}") for i in range(9)], "more"]
    batch = assert_same(Renderer(tokenizer), tokenizer, *some)
    assert tokenizer.decode(batch.ids[: batch.offsets[1]]) == f"{bos}plain é{eos}"
    assert batch.target[: batch.offsets[1]].all()
    chat_ids = batch.ids[batch.offsets[1] : batch.offsets[2]].tolist()
    assert chat_ids.count(tokenizer.bos_token_id) == 1
    assert render("plain é", tokenizer_of(LLAMA3)).input_ids[0] != tokenizer.bos_token_id


def test_a_lone_surrogate_and_no_text_are_bad_rows():
    some = ["\ud800", " \n", "", *[chat("a", "b")] * 9, chat("x\udfff", "b"), chat("x", " ")]
    tokenizer = tokenizer_of(CHATML)
    batch = assert_same(Renderer(tokenizer), tokenizer, *some)
    assert [index for index, _ in batch.bad] == [0, 1, 2, 12]
    assert "lone surrogate" in batch.bad[0][1]


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_added_tokens_that_take_white_space_along_stay_exact(side):
    def greedy(raw):
        raw.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False, **{side: True})])

    tokenizer = copy_of(CHATML, change=greedy)
    assert_same(Renderer(tokenizer), tokenizer, *[chat(f"a{i} ", " b ", "é ", "d\n") for i in range(20)])


@pytest.mark.parametrize(
    "normalizer", [normalizers.NFC(), normalizers.Lowercase(), normalizers.NFKC()], ids=["nfc", "lower", "nfkc"]
)
def test_normalizers_stay_exact(normalizer):
    def normalized(raw):
        raw.normalizer = normalizer

    tokenizer = copy_of(CHATML, change=normalized)
    some = [chat(f"e\u0301 {i}", "ANSWER ﬁ e\u0301\u0301", "É", "x") for i in range(12)] + [chat("plain", "é")]
    assert_same(Renderer(tokenizer), tokenizer, *some, "e\u0301")


def test_tokenizers_without_byte_lengths_go_by_offsets():
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁a", "ab"]
    raw = Tokenizer(
        models.BPE(
            vocab={w: i for i, w in enumerate(vocab)},
            merges=[("▁", "a"), ("a", "b")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = next(case for case in CASES if case.name == "zephyr").source()
    batch = assert_same(Renderer(tokenizer), tokenizer, *[chat("a é", "cafe 中 b", "ab", "h")] * 12, "text é")
    first = slice(0, batch.offsets[1])
    answers = [tokenizer.convert_ids_to_tokens(int(i)) for i in batch.ids[first][batch.target[first]]]
    assert answers == [*"cafe", "▁", "<0xE4>", "<0xB8>", "<0xAD>", "▁", "b", "</s>", "h", "</s>"]


def test_a_copy_in_another_process_gives_the_same():
    renderer = Renderer(tokenizer_of(LLAMA3))
    some = documents(*[chat(f"a{i}", "b") for i in range(20)])
    want = renderer.encode(some)
    copy = pickle.loads(pickle.dumps(renderer))
    got = copy.encode(some)
    assert got.ids.tolist() == want.ids.tolist()
    assert got.target.tolist() == want.target.tolist()
    assert copy.facts()["tokenizer_reason"] == renderer.facts()["tokenizer_reason"]


def test_nothing_gives_an_empty_batch():
    batch = Renderer(tokenizer_of(CHATML)).encode(documents())
    assert (len(batch), len(batch.ids), batch.offsets.tolist(), batch.bad) == (0, 0, [0], [])


def test_chat_text_ends_where_the_answer_begins():
    messages = [{"role": role, "content": content} for role, content in TURNS[:1]]
    assert chat_text(messages, tokenizer_of(CHATML), prompt=True).endswith("<|im_start|>assistant\n")
