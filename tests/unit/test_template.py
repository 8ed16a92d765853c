"""What is learned of a conversation, for the templates of real models."""

from pathlib import Path

import pytest
from chat_templates import CASES, TEMPLATES, conversation, marked, oracle, tokenizer_of, tool_conversation
from rendering import CHATML, assert_same, by_name, chat, copy_of, documents, learned, looped, with_tools

from controlllm.data.render import Renderer, render
from controlllm.data.template import ChatTemplate
from controlllm.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "masks"


@by_name
def test_masks_are_as_the_models_authors_write_them(case):
    assert_golden(case, conversation(case), case.name)


@with_tools
def test_masks_with_tools_are_as_the_models_authors_write_them(case):
    assert_golden(case, tool_conversation(case), f"{case.name}-tools")


def assert_golden(case, messages, name):
    rendered = ChatTemplate(tokenizer_of(case)).render(messages)
    golden = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert marked(rendered.text, rendered.spans) == golden
    assert list(rendered.spans) == oracle(case, rendered.text)


@by_name
def test_a_token_within_an_answer_does_not_end_it(case):
    end = next(
        token
        for token in ("<|im_end|>", "</s>", "<|eot_id|>", "<end_of_turn>", "<|end|>", case.eos)
        if token in case.special
    )
    rendered = ChatTemplate(tokenizer_of(case)).render(chat("a", f"one{end}two", "b", "c"))
    first = rendered.text[slice(*rendered.spans[0])]
    assert f"one{end}two" in first
    assert len(rendered.spans) == 2


def test_thinking_that_later_turns_drop_leaves_exact_spans():
    """The prompts of later turns are then no beginnings of the whole text."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    for name, key, last in (
        ("qwen3", "reasoning_content", "<think>\n\n</think>\n\ndone<|im_end|>"),
        ("gptoss", "thinking", "<|channel|>final<|message|>done<|return|>"),
    ):
        case = next(case for case in CASES if case.name == name)
        turns = [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "", key: "hmm", "tool_calls": [call]},
            {"role": "tool", "content": "ok"},
            {"role": "assistant", "content": "mid"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "done"},
        ]
        rendered = ChatTemplate(tokenizer_of(case)).render(turns)
        assert list(rendered.spans) == oracle(case, rendered.text)
        assert rendered.text[slice(*rendered.spans[2])] == last
        assert "hmm" not in rendered.text


def test_thinking_is_learned_where_it_is_written():
    case = next(case for case in CASES if case.name == "qwen3")
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2", "reasoning_content": "easy"}]
    assert learned(render(turns, tokenizer_of(case)), tokenizer_of(case)) == "<think>\neasy\n</think>\n\n2<|im_end|>"


def test_an_answer_that_comes_first_has_its_place():
    for case in CASES:
        if case.name in ("chatml", "llama3", "phi3", "zephyr", "gptoss"):
            rendered = ChatTemplate(tokenizer_of(case)).render(
                chat("Hi!", "q", "yes", roles=("assistant", "user", "assistant"))
            )
            assert list(rendered.spans) == oracle(case, rendered.text)


@pytest.mark.parametrize("name", ["llama3_2", "gptoss"])
def test_today_is_the_day_of_the_recipe(name):
    case = next(case for case in CASES if case.name == name)
    text = ChatTemplate(tokenizer_of(case), date="2031-07-09").write(chat("a"))
    assert ("09 Jul 2031" if name == "llama3_2" else "2031-07-09") in text


def test_tools_and_other_keys_reach_the_template():
    turn = "{{ m.mood }}<|im_start|>{{ m.content }}<|im_end|>"
    template = "{{ tools[0].function.name if tools }}{% for m in messages %}" + turn + "{% endfor %}"
    turns = [{"role": "user", "content": "a", "mood": "calm"}, {"role": "assistant", "content": "b", "mood": "gay"}]
    document = {"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]}
    text = ChatTemplate(copy_of(CHATML, template)).render(document).text
    assert text == "fcalm<|im_start|>a<|im_end|>gay<|im_start|>b<|im_end|>"


REFUSED = {
    looped("{{ m.content }}\n"): "no end-of-turn token",
    looped("{{ m.content if m.role == 'user' }}<|im_end|>"): "drops an answer",
    looped("{{ 'last' if loop.last else 'early' }}{{ m.content }}<|im_end|>"): "writes earlier turns differently",
    "{{ raise_exception('only tools here') }}": "refuses the conversation: only tools here",
    "{{ messages[0].content + 1 }}": "refuses the conversation: can only concatenate str",
}


@pytest.mark.parametrize("template", REFUSED)
def test_templates_without_exact_spans_are_refused(template):
    tokenizer = copy_of(CHATML, template)
    with pytest.raises(UserError, match=REFUSED[template]):
        render(chat("a", "b"), tokenizer)
    batch = Renderer(tokenizer).encode(documents(*[chat("a", "b")] * 20))
    assert [index for index, reason in batch.bad if REFUSED[template] in reason] == list(range(20))
    assert len(batch) == 0


def test_a_reasoning_template_that_prefills_the_thinking_is_refused():
    deepseek = next(case for case in CASES if case.name == "deepseek_v2")
    template = (TEMPLATES / "deepseek_r1_distill.jinja").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="writes earlier turns differently"):
        render(chat("a", "b"), copy_of(deepseek, template))


def test_a_system_message_that_the_template_moves_is_refused():
    mistral = next(case for case in CASES if case.name == "mistral_nemo")
    with pytest.raises(UserError, match="writes earlier turns differently"):
        render(chat("s", "u", "a", roles=("system", "user", "assistant")), tokenizer_of(mistral))


def test_a_broken_template_is_one_line():
    with pytest.raises(UserError, match=r"^the chat template is not valid: line 2: .*endfor") as caught:
        Renderer(copy_of(CHATML, "{% for m in messages %}\n{% endif %}"))
    assert "\n" not in str(caught.value)


MARKERS = looped(
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}%s{% endgeneration %}%s\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
)


@pytest.mark.parametrize("ends", [("<|im_end|>", ""), ("", "<|im_end|>"), ("<|im_end|>\n", "")])
def test_markers_are_taken_through_the_end_of_turn(ends):
    tokenizer = copy_of(CHATML, MARKERS.replace("%s", ends[0], 1).replace("%s", ends[1], 1))
    rows = [chat(f"a{i}", "one<|im_end|>", "b", "two") for i in range(20)]
    assert_same(Renderer(tokenizer), tokenizer, *rows)
    assert learned(render(rows[0], tokenizer), tokenizer).replace("\n", "") == "one<|im_end|><|im_end|>two<|im_end|>"


def test_markers_without_an_end_of_turn_are_refused():
    tokenizer = copy_of(CHATML, MARKERS.replace("%s", "", 2))
    with pytest.raises(UserError, match="no end-of-turn token"):
        render(chat("a", "b", "c", "d"), tokenizer)
