"""The built-in datasets. Sizes, row counts and licences are those that their pages on the Hub state."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from controlllm.data.dataset import assistant, dataset, register, user

if TYPE_CHECKING:
    from controlllm.data.types import Document, Message, Row


@dataset(
    "puzzles",
    # Sizes that a model of 135 M parameters can learn within minutes.
    source="reasoning-gym://chain_sum?max_terms=2&max_digits=2+gcd+number_sorting?max_numbers=4+"
    "spell_backward?min_word_len=3&max_word_len=4",
    license="Apache-2.0",
)
def puzzles(row: Row) -> Document:
    """Procedural puzzles of reasoning-gym (sums, gcd, sorting, spelling backward), in any amount."""
    return [user(row["question"]), assistant(row["answer"])]


@dataset("samsum", source="hf://knkarthick/samsum#train", license="CC-BY-NC-ND-4.0", rows=14_732)
def samsum(row: Row) -> Document | None:
    """Messenger conversations, each with a summary by a linguist."""
    if not row["dialogue"]:
        return None  # one row has a summary of nothing
    dialogue = row["dialogue"].replace("\r\n", "\n")
    return [user(f"Summarize this dialogue:\n{dialogue}"), assistant(row["summary"])]


register(
    "alpaca-cleaned",
    source="hf://yahma/alpaca-cleaned#train",
    form="alpaca",
    license="CC-BY-4.0",
    rows=51_760,
    size="44 MB",
    description="Stanford's Alpaca instructions, with the wrong and empty ones repaired.",
)
register(
    "ultrachat_200k",
    source="hf://HuggingFaceH4/ultrachat_200k#train_sft",
    form="messages",
    license="MIT",
    rows=207_865,
    size="1.6 GB",
    description="Long dialogues of many turns on a wide range of topics, filtered for Zephyr.",
)
register(
    "ultrafeedback_binarized",
    source="hf://HuggingFaceH4/ultrafeedback_binarized#train_prefs",
    form="messages",
    fields={"messages": "chosen"},
    license="MIT",
    rows=61_135,
    size="650 MB",
    description="The better one of several models' answers, as GPT-4 rates them.",
)
register(
    "OpenMathInstruct-2",
    source="hf://nvidia/OpenMathInstruct-2#train",
    form="prompt_completion",
    fields={"prompt": "problem", "completion": "generated_solution"},
    license="CC-BY-4.0",
    rows=13_972_791,
    size="20 GB",
    description="Mathematics from GSM8K and MATH and variations of it, solved step by step by Llama-3.1-405B.",
)
register(
    "OpenOrca",
    source="hf://Open-Orca/OpenOrca#train",
    form="prompt_completion",
    fields={"system": "system_prompt", "prompt": "question", "completion": "response"},
    license="MIT",
    rows=4_233_923,
    size="4.1 GB",
    description="Tasks of the FLAN collection with explanations by GPT-4 (1 M) and GPT-3.5 (3.2 M).",
)
register(
    "OpenHermes-2.5",
    source="hf://teknium/OpenHermes-2.5#train",
    form="sharegpt",
    license="none stated; see its page",
    rows=1_001_551,
    size="1.9 GB",
    description="A compilation of synthetic instructions and chats, most of them by GPT-4.",
)
for _name, _license, _rows, _size, _what in (
    ("Magpie-Pro-300K-Filtered", "Llama 3 Community License", 300_000, "563 MB", "Llama-3-70B-Instruct"),
    (
        "Magpie-Llama-3.1-Pro-MT-300K-Filtered",
        "Llama 3.1 Community License",
        300_000,
        "1.5 GB",
        "Llama-3.1-70B-Instruct, two turns",
    ),
):
    register(
        _name,
        source=f"hf://Magpie-Align/{_name}#train",
        form="sharegpt",
        license=_license,
        rows=_rows,
        size=_size,
        description=f"Instructions and answers that the aligned model itself came up with ({_what}).",
    )
register(
    "UltraInteract_sft",
    source="hf://openbmb/UltraInteract_sft#train",
    form="prompt_completion",
    fields={"prompt": "instruction", "completion": "response"},
    license="MIT",
    rows=288_579,
    size="171 MB",
    description="Reasoning in mathematics, code and logic: correct actions of preference trees.",
)
# The hub's folders of this one hold JSON beside the Arrow files, at which `datasets` stops.
for _part, _size, _what in (
    ("algorithmic_corpus", None, "Code of algorithms, sampled from The Stack v2"),
    ("synthetic_code_snippet", None, "Code snippets rewritten from the algorithmic corpus"),
    ("synthetic_qa", "3.6 GB", "Questions and answers made from the algorithmic corpus"),
):
    register(
        f"opc-annealing-{_part.replace('_', '-')}",
        source=f"hf://OpenCoder-LLM/opc-annealing-corpus/{_part}/*.arrow",
        form="text",
        license="ODC-BY-1.0",
        size=_size,
        description=f"{_what}, for the annealing phase of OpenCoder.",
    )
for _stage, _part, _rows, _size in (
    ("opc-sft-stage1", "filtered_infinity_instruct", None, "1.0 GB"),  # 1.03 M rows
    ("opc-sft-stage1", "realuser_instruct", None, None),  # 676 k
    ("opc-sft-stage1", "largescale_diverse_instruct", None, "3.5 GB"),  # 2.51 M
    ("opc-sft-stage2", "educational_instruct", 118_278, "53 MB"),
    ("opc-sft-stage2", "evol_instruct", 111_183, "137 MB"),
    ("opc-sft-stage2", "mceval_instruct", 35_943, "61 MB"),
    ("opc-sft-stage2", "package_instruct", 170_943, "286 MB"),
):
    register(
        f"{_stage}-{_part.replace('_', '-')}",
        source=f"hf://OpenCoder-LLM/{_stage}:{_part}#train",
        form="prompt_completion",
        fields={"prompt": "instruction", "completion": "output"},
        license="MIT",
        rows=_rows,
        size=_size,
        description=f"OpenCoder's instructions, {_stage.rpartition('-')[2]}: {_part.replace('_', ' ')}.",
    )


@dataset(
    "openassistant-guanaco",
    source="hf://timdettmers/openassistant-guanaco#train",
    license="Apache-2.0",
    rows=9_846,
    size="21 MB",
)
def openassistant_guanaco(row: Row) -> Document | None:
    """OpenAssistant's conversations in many languages, the best rated path of each tree (oasst1)."""
    # oasst1 itself has one message in each row, so that no row by itself is a conversation.
    parts = _SPEAKER.split(row["text"])
    turns: list[Message] = []
    for speaker, said in zip(parts[1::2], parts[2::2], strict=True):
        turns.append(user(said.strip()) if speaker == "Human" else assistant(said.strip()))
    if turns and turns[-1]["role"] == "user":
        turns.pop()  # a path that ends before the answer
    return turns or None


_SPEAKER = re.compile(r"### (Human|Assistant):")


register(
    "RedPajama-Data-1T-Sample",
    source="hf://togethercomputer/RedPajama-Data-1T-Sample/*.jsonl",
    form="text",
    license="that of each of its sources; see its page",
    rows=930_514,
    size="5.4 GB",
    # The hub has JSON lines beside a script, and a script is never run.
    description="A sample of RedPajama: web pages, code, papers, books and Wikipedia as plain text.",
)
register(
    "alpaca_zh",
    source="hf://llamafactory/alpaca_zh#train",
    form="alpaca",
    license="Apache-2.0",
    size="19 MB",
    description="Alpaca's instructions in Chinese.",
)
register(
    "ruozhiba",
    source="hf://LooksJuicy/ruozhiba#train",
    form="alpaca",
    license="Apache-2.0",
    rows=1_496,
    size="591 kB",
    description="Absurd questions of a Chinese forum, answered in earnest by GPT-4.",
)
register(
    "stem_zh",
    source="hf://hfl/stem_zh_instruction#train",
    form="alpaca",
    license="Apache-2.0",
    rows=256_186,
    size="152 MB",
    description="Questions on physics, chemistry, medicine, biology and earth science in Chinese, answered by GPT-3.5.",
)
register(
    "Llama-3-SynE",
    source="hf://survivi/Llama-3-SynE-Dataset#train",
    form="text",
    license="none stated; see its page",
    description="Text for continual pre-training in Chinese and English: web pages, books, encyclopedias, forums, "
    "papers, code, mathematics and synthetic science.",
)
