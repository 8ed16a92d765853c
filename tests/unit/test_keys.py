"""Documents side by side, and the hashes that choose among them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from controlllm.data.documents import concat, take
from controlllm.data.keys import content_key, content_keys, in_share, prompt_key, prompt_keys
from controlllm.data.types import Documents

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}

documents_of = st.lists(
    st.text("ab\x00", max_size=3) | st.just([U, A]) | st.just([U]) | st.just({"messages": [U, A], "tools": [{"a": 1}]}),
    max_size=6,
)


@given(documents_of, documents_of)
def test_take_and_concat(a, b):
    both = concat([Documents.of(a, np.arange(len(a))), Documents.of(b, np.arange(len(b)))])
    assert list(both) == a + b
    order = np.arange(len(both))[::-2]
    assert list(take(both, order)) == (a + b)[::-2]
    keys = content_keys(both)
    assert [content_key(document) for document in both] == keys.tolist()
    assert len(set(keys.tolist())) == len({repr(document) for document in both})


def test_keys_tell_order_roles_and_borders_apart():
    def m(*pairs):
        return [{"role": r, "content": c} for r, c in pairs]

    documents = ["abc", "ab", "", m(("user", "ab")), m(("user", "ab"), ("assistant", "c"))]
    documents += [m(("user", "a"), ("assistant", "bc")), m(("user", "c"), ("assistant", "ab"))]
    documents += [m(("assistant", "ab"), ("user", "c")), m(("user", "ab"), ("tool", "c"))]
    assert len({content_key(document) for document in documents}) == len(documents)


def test_keys_are_the_same_for_ever():
    keys = [content_key("abc"), content_key([U, A]), prompt_key("abc")]
    assert keys == [17864122542732461309, 18253636965344562833, 8696274497037089104]


def test_prompts_are_equal_but_for_case_and_space():
    documents = Documents.of(
        [[U, A], [A, {**U, "content": " Hi\n"}], "HI", {"messages": [U, A], "tools": [{}]}, "ho"], np.arange(5)
    )
    keys = prompt_keys(documents)
    assert len(set(keys[:4].tolist())) == 1
    assert keys[4] != keys[0]
    assert [prompt_key(document) for document in documents] == keys.tolist()


def test_shares_are_nested_independent_and_of_their_size():
    keys = content_keys(Documents.of([str(i) for i in range(20_000)], np.arange(20_000)))
    few, many, other = in_share(keys, 0.1, "a"), in_share(keys, 0.3, "a"), in_share(keys, 0.3, "b")
    assert not (few & ~many).any()
    assert abs(few.mean() - 0.1) < 0.01
    assert abs((many & other).mean() - 0.09) < 0.01
    assert in_share(keys, 1.0, "a").all()
