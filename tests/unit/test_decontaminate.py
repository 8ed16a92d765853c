"""Runs of words that training rows share with a benchmark: the same as by splitting and comparing."""

import re
import unicodedata

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from controlllm.data.decontaminate import Contamination
from controlllm.data.probes import PROBES
from controlllm.data.sources import read_rows
from controlllm.data.types import Documents

ALONE = ("HIRAGANA", "KATAKANA", "CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH", "HALFWIDTH KATAKANA")


def words_of(text):
    """By the names of the characters."""
    spaced = "".join(
        f" {c} " if c.isalnum() and unicodedata.name(c, "").startswith(ALONE) else c if c.isalnum() else " "
        for c in text.lower()
    )
    return spaced.split()


def naive(item, text, n):
    a, b = words_of(item), words_of(text)
    if min(len(a), len(b)) < n:
        return a == b != []
    return bool(
        {tuple(a[i : i + n]) for i in range(len(a) - n + 1)} & {tuple(b[i : i + n]) for i in range(len(b) - n + 1)}
    )


def chat(*contents):
    return [{"role": role, "content": c} for role, c in zip(("user", "assistant", "user"), contents, strict=False)]


word = st.sampled_from(["a", "b", "Ab", "é", "İ", "ß", "中", "の", "ー", "ｱ", "12", "x" * 9])
gap = st.sampled_from([" ", "", ", ", "\n", "_", "。", "\u2028", "'", "🙂"])
text = st.lists(st.tuples(word, gap), max_size=9).map(lambda pairs: "".join(a + b for a, b in pairs))


@settings(max_examples=400, deadline=None)
@given(st.lists(text, max_size=4), st.lists(st.lists(text, min_size=1, max_size=3), max_size=5), st.integers(1, 4))
@example(["a b c"], [["a b", "c"], ["b a"], ["x a b c y"]], 2)
def test_the_same_as_comparing_words(items, rows, n):
    found = Contamination.of(items, words=n)
    documents = [contents[0] if len(contents) == 1 else chat(*contents) for contents in rows]
    if documents:  # one that stands whole
        documents.append({"messages": chat(*rows[0]), "tools": [{}]})
        rows = [*rows, rows[0]]
    expected = [any(naive(item, content, n) for item in items for content in contents) for contents in rows]
    assert found.rows(Documents.of(documents, np.arange(len(documents)))).tolist() == expected
    hits = [found.hits(document) for document in documents]
    assert [hit is not None for hit in hits] == expected
    for hit in filter(None, hits):
        assert any(naive(item, hit, n) for item in items)


def test_across_many_texts_and_from_a_file(tmp_path):
    found = Contamination.of(["one two three four", "Zwölf Boxkämpfer jagen Viktor"], words=3)
    found.save(tmp_path / "runs.npy")
    found = Contamination.load(tmp_path / "runs.npy")
    long = "word " * 60_000  # more than is looked at together
    rows = [long, "one two", "three four", "- ONE: two, (three)!", long + "zwölf boxkämpfer jagen", "", long]
    documents = Documents.of(rows, np.arange(len(rows)))
    assert found.words == 3
    assert np.flatnonzero(found.rows(documents)).tolist() == [3, 4]
    assert found.hits(rows[3]) == "one: two, (three"


def test_a_benchmark_question_is_found_and_nothing_else():
    probe = PROBES["mmlu-dev"]
    items = [item for row in read_rows(probe.source) for item in probe.items(row)]
    questions = [re.sub(r"^Question: |\nAnswer:$", "", item["prompt"]) for item in items]
    found = Contamination.of(questions, words=13)
    long = [question for question in questions if len(words_of(question)) >= 13]
    assert len(long) > 50
    rows = [chat(f"Please help me.\n{question.upper()}  Thanks!", "Sure.") for question in long]
    assert found.rows(Documents.of(rows, np.arange(len(rows)))).all()
    story = PROBES["prose"]
    prose = [item["text"] for row in read_rows(story.source) for item in story.items(row)]
    assert not found.rows(Documents.of(prose, np.arange(len(prose)))).any()
