"""Shards: what is written is what is read, whoever writes, and no changed byte goes unnoticed."""

import contextlib
import json
import os
import random
import threading
import time

import numpy as np
import pyarrow as pa
import pytest

from controlllm.data.claims import claimed
from controlllm.data.pack import best_fit, gather
from controlllm.data.shard import ShardWriter, file_name
from controlllm.data.shard_store import ShardStore
from controlllm.data.shelf import Shelf, StoredShelf
from controlllm.errors import UserError


def documents(count=1000, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, count)
    ids = random.integers(0, 40000, lengths.sum())
    return ids, random.random(len(ids)) < 0.4, lengths


def write(file, *, vocabulary=49152, **made):
    ids, target, lengths = documents(**made)
    bins = best_fit(lengths, 64)
    starts = (np.cumsum(lengths) - lengths)[bins.items]
    writer = ShardWriter(file, vocabulary=vocabulary)
    size = lengths[bins.items]
    writer.write(gather(ids, starts, size), gather(target, starts, size), size, bins.items, bins.offsets)
    return writer.close()


def publish(store, key="ab", **made):
    with store.writing(key) as partial:
        facts = {"key": key, "rows": 1000, "files": {"train": write(partial / file_name(key, "train"), **made)}}
        store.publish(key, partial, facts)
    return facts


def test_every_document_comes_back_with_its_targets_and_its_row(tmp_path):
    store = ShardStore(tmp_path)
    facts = publish(store)
    shelf = StoredShelf("a", [facts], str(tmp_path))
    ids, target, lengths = documents()
    starts = np.cumsum(lengths) - lengths
    seen = []
    for number in range(shelf.rows_of(0)):
        row = shelf.read(0, number)
        begin = 0
        for size, source in zip(row["lengths"], row["rows"], strict=True):
            assert size == lengths[source]
            assert (row["input_ids"][begin : begin + size] == ids[starts[source] :][:size]).all()
            assert (row["target"][begin : begin + size] == target[starts[source] :][:size]).all()
            seen.append(source)
            begin += size
    assert sorted(seen) == list(range(1000))


@pytest.mark.parametrize(("vocabulary", "kind"), [(65536, pa.uint16()), (65537, pa.uint32())])
def test_ids_take_two_bytes_where_the_vocabulary_allows(tmp_path, vocabulary, kind):
    write(tmp_path / "a.arrow", vocabulary=vocabulary)
    assert pa.ipc.open_file(str(tmp_path / "a.arrow")).schema.field("input_ids").type.value_type == kind


def test_other_tools_read_a_shard(tmp_path):
    facts = write(tmp_path / "a.arrow")
    from datasets import Dataset

    table = pa.ipc.open_file(str(tmp_path / "a.arrow")).read_all()
    assert table.num_rows == facts["bins"]
    first = Dataset(table)[0]
    assert sum(first["lengths"]) == len(first["input_ids"]) == len(first["target"])


def test_no_flipped_bit_is_silent(tmp_path):
    store = ShardStore(tmp_path)
    facts = publish(store)
    file = store.path("ab")
    whole = file.read_bytes()
    places = random.Random(0)
    silent = 0
    for _ in range(300):
        place = places.randrange(len(whole))
        broken = bytearray(whole)
        broken[place] ^= 1 << places.randrange(8)
        file.write_bytes(broken)
        try:
            shelf = StoredShelf("a", [facts], str(tmp_path))
            rows = [shelf.read(0, row) for row in range(shelf.rows_of(0))]
        except (UserError, pa.ArrowException, OSError, ValueError):
            continue
        file.write_bytes(whole)
        intact = StoredShelf("a", [facts], str(tmp_path))
        silent += any(
            not np.array_equal(row[name], intact.read(0, i)[name]) for i, row in enumerate(rows) for name in row
        )
    assert silent == 0


def test_a_cut_off_or_removed_file_is_made_again(tmp_path):
    store = ShardStore(tmp_path)
    publish(store)
    assert store.facts("ab")
    with store.path("ab").open("r+b") as stream:
        stream.truncate(100)
    assert store.facts("ab") is None
    store.path("ab").unlink()
    assert store.facts("ab") is None


def test_nothing_half_written_is_visible(tmp_path):
    store = ShardStore(tmp_path)
    with contextlib.suppress(KeyboardInterrupt), store.writing("ab") as partial:
        write(partial / file_name("ab", "train"))
        raise KeyboardInterrupt
    assert store.facts("ab") is None
    assert store.keys() == []
    assert list(tmp_path.iterdir()) == []


def test_one_of_eight_writers_builds(tmp_path):
    built, barrier = [], threading.Barrier(8)

    def work():
        store = ShardStore(tmp_path)
        barrier.wait()
        with store.writing("ab") as partial:
            if partial is not None and store.facts("ab") is None:
                built.append(1)
                time.sleep(0.2)
                facts = {"key": "ab", "files": {"train": write(partial / file_name("ab", "train"))}}
                store.publish("ab", partial, facts)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]
    assert ShardStore(tmp_path).facts("ab")


def test_a_claim_of_a_process_that_is_gone_is_taken_over(tmp_path):
    import socket

    file = tmp_path / "claim"
    file.write_text(f"{socket.gethostname()} 999999999")
    with claimed(file) as mine:
        assert mine
        with claimed(file) as again:
            assert not again
    file.write_text("another-machine 1")
    with claimed(file) as mine:
        assert not mine
    os.utime(file, (0, 0))
    with claimed(file) as mine:
        assert mine
    assert not file.exists()


def test_a_folder_that_is_no_dataset_is_named(tmp_path):
    with pytest.raises(UserError, match=r"index.json: not found; give a folder that controlllm prepare made"):
        Shelf.open(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Shelf.open(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"name": "a", "units": [publish(ShardStore(tmp_path / "s"))]}))
    with pytest.raises(UserError, match="cannot be read"):
        Shelf.open(tmp_path).read(0, 0)
