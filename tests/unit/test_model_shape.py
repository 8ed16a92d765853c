"""A decoder's sizes, read from a folder's config and a GGUF file's header."""

import json
import struct

import pytest

from controlllm.model_shape import Decoder, model_shape


def test_shape_of_a_folder(tiny_base):
    shape = model_shape(str(tiny_base))
    assert shape is not None
    assert shape.decoder == Decoder(64, 96, 2, 1, 32, 258, tied=True)
    decoder = shape.decoder
    assert decoder is not None
    assert 4 * (shape.layers * decoder.block + decoder.outer) == pytest.approx(shape.weight_bytes, rel=0.05)


def test_shape_of_experts_is_unknown(tiny_base, tmp_path):
    for file in tiny_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_local_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = model_shape(str(tmp_path))
    assert shape is not None
    assert shape.decoder is None


@pytest.mark.parametrize("tied", [True, False])
def test_shape_of_a_gguf_file(tied, tmp_path):
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = {
        "block_count": 4, "context_length": 99, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2,
    }  # fmt: skip
    pairs = [text(f"llama.{name}") + struct.pack("<II", 4, value) for name, value in numbers.items()]
    words = ["a", "b", "blk.0.attn_output.weight"]
    pairs.append(text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(text, words)))
    tensors = text("token_embd.weight") + (b"" if tied else text("output.weight"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2, len(pairs)) + b"".join(pairs) + tensors)
    shape = model_shape(str(file))
    assert shape is not None
    assert shape.decoder == Decoder(64, 96, 4, 2, 16, 3, tied)
