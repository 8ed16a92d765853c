"""Each built-in dataset reads a row as its source has it: fields and types are the real ones, texts are short."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from controlllm.config import DatasetConfig
from controlllm.data.catalog import CATALOG, dataset_names, find_dataset, listing
from controlllm.data.dataset import dataset, register
from controlllm.data.documents import documents
from controlllm.data.types import RowBatch
from controlllm.errors import UserError


def talk(*contents, system=None):
    turns = [
        {"role": role, "content": content} for role, content in zip(("user", "assistant") * 9, contents, strict=False)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


def instruction(question, answer, **more):
    return {"instruction": question, "output": answer} | more


MAGPIE = {
    "uuid": "b0a2fc0b", "model": "meta-llama/Meta-Llama-3-70B-Instruct", "instruction": "What are plates?",
    "response": "Slabs.",
    "gen_input_configs": {"temperature": 1.0, "top_p": 1.0, "seed": None}, "instruct_reward": 1.5, "language": "EN",
    "other_task_category": ["Reasoning"], "llama_guard_2": "safe", "response_length": 6,
}  # fmt: skip


def said(*turns, **more):
    return [{"from": ("human", "gpt")[i % 2], "value": turn, **more} for i, turn in enumerate(turns)]


CHAT = talk("Create a protagonist", "Name: Ava", "Wow", "Sure")
FEEDBACK = talk("Which animal has two hands?", "An animal with two hands is a primate.")
MATH = "Solve for $y$:\n\n$$\\frac{y^2 - 3y + 2}{y - 2} = y + 1$$"
GUANACO = "### Human: Can you explain monopsony?### Assistant: A market with one buyer.### Human: Now to a dog"
DIALOGUE = "Amanda: I baked cookies. Do you want some?\r\nJerry: Sure!\r\nAmanda: I'll bring you tomorrow :-)"
SUMMARY = "Amanda baked cookies and will bring Jerry some tomorrow."
ROWS = {
    "puzzles": ({"kind": "gcd", "question": "gcd of 4 and 6?", "answer": "2"}, talk("gcd of 4 and 6?", "2")),
    "samsum": (
        {"id": "13818513", "summary": SUMMARY, "dialogue": DIALOGUE},
        talk("Summarize this dialogue:\n" + DIALOGUE.replace("\r", ""), SUMMARY),
    ),
    "alpaca-cleaned": (
        instruction("Identify the odd one out.", "Telegram", input="Twitter, Instagram, Telegram"),
        talk("Identify the odd one out.\n\nTwitter, Instagram, Telegram", "Telegram"),
    ),
    "ultrachat_200k": (
        {"prompt": "Create a protagonist", "prompt_id": "d938b65d", "messages": CHAT},
        CHAT,
    ),
    "ultrafeedback_binarized": (
        {"prompt": "Which animal has two hands?", "prompt_id": "6a3e", "chosen": FEEDBACK,
         "rejected": talk("Which", "None"),
         "messages": FEEDBACK, "score_chosen": 8.5, "score_rejected": 4.0},
        FEEDBACK,
    ),
    "OpenMathInstruct-2": (
        {"problem": MATH, "generated_solution": "Factor the numerator.", "expected_answer": "\\emptyset",
         "problem_source": "augmented_math"},
        talk(MATH, "Factor the numerator."),
    ),
    "OpenOrca": (
        {"id": "niv.242684", "system_prompt": "You are an AI assistant.", "question": "Say it in French.",
         "response": "Oui."},
        talk("Say it in French.", "Oui.", system="You are an AI assistant."),
    ),
    "OpenHermes-2.5": (
        {"conversations": said("Every day, a tree drops 7 leaves.", "February has 28 days.", weight=None),
         "source": "airoboros2.2", "category": "orca", "skip_prompt_formatting": False,
         "system_prompt": None, "title": None},
        talk("Every day, a tree drops 7 leaves.", "February has 28 days."),
    ),
    "Magpie-Pro-300K-Filtered": (
        MAGPIE | {"conversations": said("What are plates?", "Slabs.")}, talk("What are plates?", "Slabs.")
    ),
    "Magpie-Llama-3.1-Pro-MT-300K-Filtered": (
        MAGPIE | {"conversations": said("What are plates?", "Slabs.", "How many?", "Seven."),
         "instruction_2": "How many?"},
        talk("What are plates?", "Slabs.", "How many?", "Seven."),
    ),
    "UltraInteract_sft": (
        {"task": "Coding", "dataset": "TACO", "instruction": "Write Python code.", "response": "print(1)",
         "id": "TACO_1", "parent_id": "r"},
        talk("Write Python code.", "print(1)"),
    ),
    "openassistant-guanaco": ({"text": GUANACO}, talk("Can you explain monopsony?", "A market with one buyer.")),
    "RedPajama-Data-1T-Sample": ({"text": "A page.", "meta": '{"url": "x"}', "red_pajama_subset": "c4"}, "A page."),
    "alpaca_zh": (instruction("解释两个理论。", "细胞理论。", input=""), talk("解释两个理论。", "细胞理论。")),
    "ruozhiba": (instruction("只剩一个心脏还能活吗?", "能。"), talk("只剩一个心脏还能活吗?", "能。")),
    "stem_zh": (instruction("什么是细胞?", "生命的基本单位。", input=""), talk("什么是细胞?", "生命的基本单位。")),
    "Llama-3-SynE": ({"text": "中文网页。"}, "中文网页。"),
    **{
        f"opc-annealing-{part}": ({"text": "def f(): ...", "lang": "python"}, "def f(): ...")
        for part in ("algorithmic-corpus", "synthetic-code-snippet", "synthetic-qa")
    },
    **{
        f"opc-sft-stage1-{part}": (instruction("Sort it.", "sorted(x)", tag="code"), talk("Sort it.", "sorted(x)"))
        for part in ("filtered-infinity-instruct", "realuser-instruct", "largescale-diverse-instruct")
    },
    **{
        f"opc-sft-stage2-{part}": (instruction("Sort it.", "sorted(x)", seq_id=7), talk("Sort it.", "sorted(x)"))
        for part in ("evol-instruct", "mceval-instruct", "package-instruct")
    },
    "opc-sft-stage2-educational-instruct": (
        instruction("Sort it.", "sorted(x)", seq_id=7, code="def f(x): ...",
                    entry_point="f", testcase=["assert f([]) == []"]),
        talk("Sort it.", "sorted(x)"),
    ),
}  # fmt: skip


def test_every_built_in_dataset_has_a_row_here():
    assert ROWS.keys() == CATALOG.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_read(name):
    row, expected = ROWS[name]
    data, numbers = find_dataset(DatasetConfig(name=name)), np.arange(1, 3)
    for batch in (
        RowBatch("f", numbers, dicts=[row, row]),
        RowBatch("f", numbers, table=pa.Table.from_pylist([row, row])),
    ):
        found = documents(data, batch)
        assert found.bad == []
        assert list(found.documents) == [expected, expected]


def test_another_source_for_a_name_of_the_catalog():
    found = find_dataset(DatasetConfig(name="alpaca-cleaned", source="mine.jsonl"))
    assert (found.source, found.form) == ("mine.jsonl", "alpaca")


@pytest.mark.parametrize(("config", "says"), [
    ({"name": "alpaca-claned"}, "unknown dataset 'alpaca-claned'; did you mean 'alpaca-cleaned'?"),
    ({"name": "OpenHermes"}, "did you mean 'OpenHermes-2.5'?"),
    ({"name": "zzz"}, "unknown dataset 'zzz'; known: alpaca-cleaned, alpaca_zh,"),
    ({"name": "zzz", "source": "a.jsonl"}, "has a source but no format, and is not in the catalog; formats: messages,"),
    ({"name": "zzz", "format": "text"}, "dataset 'zzz': format text needs a source"),
    ({"name": "samsum", "fields": {"text": "a"}}, "fields are for formats"),
    ({"name": "ruozhiba", "fields": {"instrction": "a"}}, "did you mean 'instruction'?"),
])  # fmt: skip
def test_what_cannot_be_found_is_said_in_one_line(config, says):
    with pytest.raises(UserError) as error:
        find_dataset(DatasetConfig(**config))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_is_taken_once():
    try:
        register("twice", source="x", form="text", license="MIT")
        with pytest.raises(UserError, match=r"'twice' is registered twice, by test_builtin_d.* and by test_b"):
            dataset("twice", source="y", license="MIT")(lambda row: None)
    finally:
        CATALOG.pop("twice")


def test_listing_says_where_from_and_under_which_licence():
    assert [line.name for line in listing()] == dataset_names()
    assert all(line.description and line.source and line.license for line in listing())


def test_the_catalog_needs_no_heavy_import():
    heavy = {"pyarrow", "numpy", "torch", "datasets", "transformers"}
    code = f"import sys, controlllm.data.catalog as c; c.listing(); print({heavy} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
