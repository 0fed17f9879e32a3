import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_sft.data.labels import LabelRow, LabelStore, LabelWriter
from latent_sft.errors import ArtefactError
from latent_sft.method.types import Superposition

MADE_FROM = {"encoder": "abc", "tokenizer": "t1", "rate": 2}


def make_row(index, top_k=3, vocab=1000):
    generator = torch.Generator().manual_seed(index)
    num_latents = 1 + index % 4
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:top_k] for _ in range(num_latents)])
    weights = torch.softmax(torch.randn(num_latents, top_k, generator=generator), -1)
    return LabelRow(id=f"row-{index}", hash=f"{index:016x}", latents=Superposition(ids, weights))


def open_writer(path, **changes):
    options = {"top_k": 3, "dtype": "float32", "shard_size": 4, "num_rows": 10} | changes
    made_from = options.pop("made_from", MADE_FROM)
    return LabelWriter(path, made_from, **options)


def fill(path, **changes):
    writer = open_writer(path, **changes)
    for shard in writer.missing_shards():
        writer.write(shard, [make_row(i) for i in writer.rows_of(shard)])
    writer.finish()
    return writer


def assert_holds_all(store, num_rows=10):
    assert list(store) == [f"row-{i}" for i in range(num_rows)]
    for i in range(num_rows):
        row = make_row(i)
        latents = store.get(row.id, row.hash)
        assert torch.equal(latents.ids, row.latents.ids)
        torch.testing.assert_close(latents.weights, row.latents.weights)


def test_shards_partition_the_rows(tmp_path):
    writer = open_writer(tmp_path)
    assert writer.num_shards == 3
    assert [list(writer.rows_of(s)) for s in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert writer.missing_shards() == [0, 1, 2]
    assert writer.missing_shards(0, 2) == [0, 2]
    assert writer.missing_shards(1, 2) == [1]


def test_round_trip_float32(tmp_path):
    fill(tmp_path)
    store = LabelStore(tmp_path, expect=MADE_FROM)
    assert len(store) == 10 and store.top_k == 3 and store.made_from == MADE_FROM
    assert "row-3" in store and "row-10" not in store
    latents = store.get("row-3", make_row(3).hash)
    assert latents.ids.shape == (4, 3) and latents.ids.dtype == torch.int64 and latents.weights.dtype == torch.float32
    assert_holds_all(store)


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3), min_size=1, max_size=5))
def test_float16_rows_come_back_normalised_and_near(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("store")
    exact = torch.tensor(weights) / torch.tensor(weights).sum(-1, keepdim=True)
    row = LabelRow(id="a", hash="h", latents=Superposition(torch.arange(exact.numel()).view_as(exact), exact))
    writer = open_writer(path, dtype="float16", num_rows=1)
    writer.write(0, [row])
    latents = LabelStore(path).get("a", "h")
    torch.testing.assert_close(latents.weights.sum(-1), torch.ones(len(weights)))
    torch.testing.assert_close(latents.weights, exact, rtol=2e-3, atol=1e-5)


def test_full_vocabulary_latents(tmp_path):
    writer = open_writer(tmp_path, top_k=5000, num_rows=1, dtype="float16")
    latents = Superposition(torch.arange(5000).repeat(2, 1), torch.full((2, 5000), 1 / 5000))
    writer.write(0, [LabelRow(id="a", hash="h", latents=latents)])
    assert torch.equal(LabelStore(tmp_path).get("a", "h").ids, latents.ids)


def test_other_settings_are_refused_and_nothing_is_overwritten(tmp_path):
    fill(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ArtefactError, match=r"rate was 2, now 4; tokenizer was 't1', now 't2'; k was 3, now 5"):
        open_writer(tmp_path, made_from=MADE_FROM | {"rate": 4, "tokenizer": "t2"}, top_k=5)
    with pytest.raises(ArtefactError, match=r"segmentation was None, now 'step'"):
        open_writer(tmp_path, made_from=MADE_FROM | {"segmentation": "step"})
    with pytest.raises(ArtefactError, match=r"num_rows was 10, now 11.*Nothing was overwritten"):
        open_writer(tmp_path, num_rows=11)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("field", "value"), [("tokenizer", "t2"), ("rate", 4), ("spec", "new")])
def test_reading_labels_of_another_experiment_names_the_field(tmp_path, field, value):
    fill(tmp_path)
    with pytest.raises(ArtefactError, match=rf"another experiment \({field} was .*now {value!r}\)"):
        LabelStore(tmp_path, expect=MADE_FROM | {field: value})


def test_missing_store(tmp_path):
    with pytest.raises(ArtefactError, match="no labels here; run latent-sft label first"):
        LabelStore(tmp_path / "labels")


def test_unknown_format(tmp_path):
    fill(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ArtefactError, match="not a label store of format 1"):
        LabelStore(tmp_path)


def test_unknown_id_and_changed_row(tmp_path):
    fill(tmp_path)
    store = LabelStore(tmp_path)
    with pytest.raises(ArtefactError, match=r"no labels for the example with id 'nobody'.*data has changed"):
        store.get("nobody", "0")
    with pytest.raises(ArtefactError, match=r"id 'row-1'.*other tokens.*data or the tokenizer has changed"):
        store.get("row-1", "f" * 16)


def test_duplicate_ids(tmp_path):
    writer = open_writer(tmp_path, num_rows=2)
    writer.write(0, [make_row(1), make_row(1)])
    with pytest.raises(ArtefactError, match="'row-1' occurs twice"):
        LabelStore(tmp_path)


def test_one_flipped_byte_is_found(tmp_path):
    fill(tmp_path)
    path = tmp_path / "labels-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match=r"labels-00001\.arrow.*damaged.*delete it and run latent-sft label again"):
        LabelStore(tmp_path)
    path.unlink()
    writer = open_writer(tmp_path)
    assert writer.missing_shards() == [1]
    writer.write(1, [make_row(i) for i in writer.rows_of(1)])
    assert_holds_all(LabelStore(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "no sidecar", "broken sidecar", "empty sidecar"])
def test_partial_shards_are_written_again(tmp_path, damage):
    fill(tmp_path)
    data, sidecar = tmp_path / "labels-00002.arrow", tmp_path / "labels-00002.json"
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:-8])
    elif damage == "no sidecar":
        sidecar.unlink()
    else:
        sidecar.write_text('{"rows": 2, "by' if damage == "broken sidecar" else "{}")
    with pytest.raises(ArtefactError, match=r"1 of 3 shards are not finished \(labels-00002"):
        LabelStore(tmp_path)
    with pytest.raises(ArtefactError, match="incomplete"):
        open_writer(tmp_path).finish()
    assert open_writer(tmp_path).missing_shards() == [2]
    fill(tmp_path)
    assert_holds_all(LabelStore(tmp_path))


def test_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    writer = open_writer(tmp_path)
    writer.write(0, [make_row(i) for i in writer.rows_of(0)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(ArtefactError, match=r"labels-00001\.arrow.*No space left on device"):
            writer.write(1, [make_row(i) for i in writer.rows_of(1)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels-00000.arrow", "labels-00000.json", "manifest.json"]
    fill(tmp_path)
    assert_holds_all(LabelStore(tmp_path))


def test_wrong_rows_are_refused(tmp_path):
    writer = open_writer(tmp_path, num_rows=1)
    with pytest.raises(ValueError, match="shard 0 holds 1 rows, got 2"):
        writer.write(0, [make_row(0), make_row(1)])
    with pytest.raises(ValueError, match=r"'row-0': latents of shape \[1, 4\]"):
        writer.write(0, [make_row(0, top_k=4)])
    good = make_row(0)
    for bad in (float("nan"), -0.5):
        weights = good.latents.weights.clone()
        weights[0, 0] = bad
        row = LabelRow(id="x", hash="h", latents=Superposition(good.latents.ids, weights))
        with pytest.raises(ArtefactError, match=r"'x': the encoder gave weights.*diverged"):
            writer.write(0, [row])


def test_reading_maps_the_file_instead_of_copying_it(tmp_path):
    fill(tmp_path)
    store = LabelStore(tmp_path)
    shard = store._open(0)
    assert not shard.ids.flags.owndata and not shard.ids.flags.writeable
    assert shard.ids.dtype == np.int32


def test_pickled_store_reads_in_another_process(tmp_path):
    fill(tmp_path)
    store = LabelStore(tmp_path)
    store.get("row-0", make_row(0).hash)
    assert_holds_all(pickle.loads(pickle.dumps(store)))
    loader = torch.utils.data.DataLoader(
        [(store, i) for i in range(10)],
        batch_size=None,
        num_workers=2,
        collate_fn=_read,
        multiprocessing_context="fork",
    )
    assert [row.tolist() for row in loader] == [make_row(i).latents.ids.tolist() for i in range(10)]


def _read(item):
    store, index = item
    return store.get(f"row-{index}", make_row(index).hash).ids


def start(task, *arguments):
    """Run this file as a script (see its end); a fork of the test process could inherit a held lock of torch."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, task, *map(str, arguments)], env=environment, stdout=subprocess.PIPE
    )


def write_share(path, rank):
    writer = open_writer(path, num_rows=40)
    for shard in writer.missing_shards(int(rank), 2):
        writer.write(shard, [make_row(i) for i in writer.rows_of(shard)])


def write_until(path, file_name):
    replace = os.replace

    def replace_or_hang(source, target):
        if str(target).endswith(file_name):
            sys.stdout.write("reached\n")
            sys.stdout.flush()
            time.sleep(600)
        replace(source, target)

    os.replace = replace_or_hang
    fill(path)


def test_two_processes_write_one_store(tmp_path):
    processes = [start("write_share", tmp_path, rank) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    open_writer(tmp_path, num_rows=40).finish()
    assert_holds_all(LabelStore(tmp_path), 40)


@pytest.mark.parametrize("file_name", ["labels-00001.arrow", "labels-00001.json"])
def test_a_killed_process_loses_only_its_shard(tmp_path, file_name):
    process = start("write_until", tmp_path, file_name)
    assert process.stdout.readline() == b"reached\n"
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert list(tmp_path.glob(".*.part")), "the kill left a partial file"
    kept = (tmp_path / "labels-00000.arrow").stat().st_mtime_ns

    assert open_writer(tmp_path).missing_shards() == [1, 2]
    fill(tmp_path)
    assert (tmp_path / "labels-00000.arrow").stat().st_mtime_ns == kept
    assert not list(tmp_path.glob(".*.part"))
    assert_holds_all(LabelStore(tmp_path))


if __name__ == "__main__":
    {"write_share": write_share, "write_until": write_until}[sys.argv[1]](*sys.argv[2:])
