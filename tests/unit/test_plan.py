"""Rows that are filled into a plan are as the template writes them, or go by the template."""

import pytest
from chat_templates import tokenizer_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rendering import CHATML, assert_same, by_name, chat, copy_of, documents, looped

from controlllm.data.render import Renderer, render

SHAPES = [("user", "assistant"), ("user", "assistant", "user", "assistant"), ("system", "user", "assistant")]


@by_name
def test_rows_are_filled_in_without_running_the_template(case):
    renderer = Renderer(tokenizer_of(case))
    rows = [chat(f"Question {i}?", "It's fine: é 中.") for i in range(100)]
    assert_same(renderer, tokenizer_of(case), *rows)
    facts = renderer.facts()
    assert (facts["rows_by_plan"], facts["rows_by_template"], facts["plans"]) == (100, 0, "on")
    assert facts["tokenizer"].startswith("fastokens")


PIECES = ["</think>", "<think>a</think>\n\n", "/no_think", "<tool_response>", "<|channel|>final<|message|>", "<<SYS>>"]

PIECES += [
    " ",
    "\n",
    "\n\n",
    "\t",
    "\x1c",
    "\u00a0",
    "\u2028",
    "{{ x }}",
    "'q\"\\",
    "<b>&amp;",
    "e\u0301",
    "👨‍👩‍👧",
    "the the",
]


@by_name
def test_filled_in_is_as_written_out(case):
    tokenizer = tokenizer_of(case)
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
    piece = st.one_of(st.sampled_from([*PIECES, *tokens]), st.text(max_size=6), st.sampled_from(["a", "hello the"]))
    content = st.lists(piece, max_size=4).map("".join)
    document = st.one_of(
        content,
        *(st.tuples(*(content for _ in roles)).map(lambda c, r=roles: chat(*c, roles=r)) for roles in SHAPES),
    )
    renderer = Renderer(tokenizer)
    renderer.encode(documents(*(chat("a", "b", "c", "d", roles=roles) for roles in SHAPES for _ in range(8))))

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(document, min_size=1, max_size=5))
    def same(some):
        assert_same(renderer, tokenizer, *some)

    same()
    assert renderer.facts()["plans"] == "on"


UNSEEN = looped(
    "<|im_start|>{{ m.role }}\n{{ 'SECRET' if m.content in 'my password' else m.content }}<|im_end|>\n",
    after="{{ '<|im_start|>assistant\n' if add_generation_prompt }}",
)


def test_a_row_that_is_filled_in_wrongly_turns_plans_off():
    tokenizer = copy_of(CHATML, UNSEEN)
    renderer = Renderer(tokenizer)
    rows = [chat(f"hello {i}", "fine") for i in range(40)] + [chat("password", "fine")]
    batch = renderer.encode(documents(*rows))
    assert [batch.ids[a:b].tolist() for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)] == [
        render(row, tokenizer).input_ids for row in rows
    ]
    assert renderer.notes == ["the template writes otherwise than was planned: row 40"]
    assert renderer.facts()["plans"].startswith("off: ")
    assert renderer.facts()["rows_by_template"] == 41


def test_a_row_that_the_template_refuses_unforeseen_turns_plans_off():
    tokenizer = copy_of(CHATML, UNSEEN.replace("'SECRET'", "raise_exception('not that')"))
    renderer = Renderer(tokenizer)
    batch = renderer.encode(documents(*[chat(f"hello {i}", "fine") for i in range(40)], chat("password", "fine")))
    assert batch.bad == [(40, "the chat template refuses the conversation: not that")]
    assert renderer.facts()["plans"].startswith("off: ")


DEPENDENT = {
    "{{ m.content[:2] }}": "__getitem__",
    "{{ m.content | length }}{{ m.content }}": "length",
    "{{ m.content | upper }}": "upper",
    "{{ m.content | tojson }}": "changes white space",
    "{{ m.content | e }}": "changes contents",
    "{% for c in m.content %}{{ c }}{% endfor %}": "a loop over characters",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(m.content)[:3] }}": "a slice",
    "{% set y %}{{ m.content }}{% endset %}{{ y | length }}": "length",
    "{{ ('a' ~ m.content) | length }}": "length",
    "{{ '%s!' | format(m.content) | truncate(9) }}": "truncate",
}


@pytest.mark.parametrize("use", DEPENDENT)
def test_templates_that_depend_on_contents_are_not_planned(use):
    template = "{% for m in messages %}{{ m.role }}:{% if m.role == 'user' %}" + use
    template += "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    tokenizer = copy_of(CHATML, template)
    renderer = Renderer(tokenizer)
    assert_same(renderer, tokenizer, *[chat(f"hello {i}", "fine") for i in range(20)])
    facts = renderer.facts()
    assert facts["rows_by_plan"] == 0
    assert any(DEPENDENT[use] in why for why in facts["shapes_without_plan"])


HIDDEN = [
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ 'YES' if 'magic' in f(m.content) else m.content }}",
    "{% set y = m.content ~ '' %}{{ y.split('magic')[-1] }}",
    "{% set y %}{{ m.content }}{% endset %}{{ y.replace('magic', '') }}",
    "{{ m.content.split('magic')[-1] }}",
    "{{ m.content | replace('magic', '') }}",
    "{{ '{}'.format(m.content).split('magic')[-1] }}",
    "{{ 'YES' if m.content.startswith('magic') else m.content }}",
    "{{ 'YES' if m.content == 'magic' else m.content }}",
    "{{ m.content.lstrip('m') }}",
]


@pytest.mark.parametrize("use", HIDDEN)
def test_contents_that_a_template_asks_for_go_by_the_template(use):
    template = "{% for m in messages %}{{ m.role }}:{% if m.role == 'user' %}" + use
    template += "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    tokenizer = copy_of(CHATML, template)
    renderer = Renderer(tokenizer)
    some = [chat(f"hello {i}", "fine") for i in range(100)]
    assert_same(renderer, tokenizer, *some, *[chat(text, "fine") for text in ("magic", "magic x", "x magic")])
    facts = renderer.facts()
    assert facts["rows_by_plan"] in (100, 101)
    assert facts["rows_by_template"] == 103 - facts["rows_by_plan"]
