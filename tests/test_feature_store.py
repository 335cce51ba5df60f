"""The cache on disk: whole or not at all, mended when torn, bounded, safe for two at once."""

import errno
import json
import multiprocessing
import os
import pathlib
import shutil
import threading
import time
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tl_jax import cache_folder, feature_rows, feature_store
from tl_jax.errors import UserError
from tl_jax.feature_rows import Layout

EXAMPLES, VIEWS = 23, 2
KEY = {"weights": "abc", "boundary": 3}
LAYOUT = Layout(
    name="'train' of sample",
    rows=EXAMPLES * VIEWS,
    examples=EXAMPLES,
    shapes=(
        jax.ShapeDtypeStruct((1, 3, 2), jnp.float32),
        jax.ShapeDtypeStruct((1, 5), jnp.bfloat16),
    ),
)


def leaves():
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=(LAYOUT.rows, 3, 2)).astype(np.float32),
        rng.normal(size=(LAYOUT.rows, 5)).astype(ml_dtypes.bfloat16),
    ]


LABELS = np.tile(np.arange(EXAMPLES, dtype=np.int32) % 7, VIEWS)


def pieces(size=8):
    """Rows as a network gives them, a view after the other."""
    for view in range(VIEWS):
        for start in range(view * EXAMPLES, (view + 1) * EXAMPLES, size):
            stop = min(start + size, (view + 1) * EXAMPLES)
            yield [leaf[start:stop] for leaf in leaves()], LABELS[start:stop]


class Timed:
    """What gives rows, and took so many seconds."""

    def __init__(self, produce, seconds=1.5):
        self._produce, self._seconds = produce, seconds

    def __call__(self):
        return self._produce()

    def seconds(self):
        return self._seconds


def store(folder, produce=pieces, limit=1e9, key=KEY, seconds=1.5):
    timed = Timed(produce, seconds)
    return feature_store.on_disk(folder, key, LAYOUT, timed, limit, "the sample")


def test_rows_know_what_they_took_whoever_made_them(tmp_path):
    assert feature_rows.in_memory(LAYOUT, Timed(pieces, 2.5)).seconds == 2.5
    assert store(tmp_path, seconds=2.5).seconds == 2.5
    assert store(tmp_path, never, seconds=0.1).seconds == 2.5
    manifest = tmp_path / feature_store.name_of(KEY) / "manifest.json"
    for wrong in ("NaN", "-1", "1" + 400 * "0", '"x"'):
        manifest.write_text(manifest.read_text().replace("2.5", wrong))
        assert store(tmp_path, seconds=2.5).seconds == 2.5


def check(rows):
    """Every row of every view is what was put in, bit for bit."""
    assert len(rows) == EXAMPLES
    for view in range(VIEWS):
        order = np.random.default_rng(view).permutation(EXAMPLES)[:17]
        batch = rows.load(order, np.full(17, view, np.int32))
        for found, leaf in zip(batch["activations"], leaves(), strict=True):
            expected = leaf[view * EXAMPLES + order]
            assert found.dtype == expected.dtype
            assert found.tobytes() == expected.tobytes()
        np.testing.assert_array_equal(batch["label"], LABELS[order])
        np.testing.assert_array_equal(batch["index"], order)
    first = rows.load([4, 2])["activations"][0]
    np.testing.assert_array_equal(first, leaves()[0][[4, 2]])
    assert rows.load([])["activations"][1].shape == (0, 5)
    for found, leaf in zip(rows.tree(), leaves(), strict=True):
        assert found.tobytes() == leaf.tobytes()


def never():
    raise AssertionError("computed although it is there")


@pytest.mark.parametrize("shard_bytes", [1, 34 * 10, 10**9])
def test_what_is_put_in_comes_out(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(feature_store, "SHARD_BYTES", shard_bytes)
    check(store(tmp_path))
    check(store(tmp_path, never))
    assert feature_rows.in_memory(LAYOUT, Timed(pieces)).labels.shape == (EXAMPLES,)
    check(feature_rows.in_memory(LAYOUT, Timed(pieces)))
    assert LAYOUT.row_bytes == 34


def test_another_key_is_another_cache(tmp_path):
    store(tmp_path)
    with pytest.raises(AssertionError):
        store(tmp_path, never, key={**KEY, "boundary": 4})
    assert feature_store.find(tmp_path, {**KEY, "boundary": 4}, LAYOUT) is None


def dies_halfway():
    for number, piece in enumerate(pieces()):
        if number == 3:
            os._exit(9)
        yield piece


MOMENTS = ("a piece", "the labels", "half the manifest", "the renaming")


def die(folder, moment):
    """Begins to write a cache, and is killed."""
    feature_store.SHARD_BYTES = 34 * 4
    save, write_text = safetensors.numpy.save, pathlib.Path.write_text

    def saves(tensors):
        return os._exit(9) if "labels" in tensors else save(tensors)

    def writes(path, text, *rest):
        if path.name == cache_folder.MANIFEST:
            write_text(path, text[: len(text) // 2])
            os._exit(9)
        return write_text(path, text, *rest)

    if moment == "the labels":
        safetensors.numpy.save = saves
    if moment == "half the manifest":
        pathlib.Path.write_text = writes
    if moment == "the renaming":
        pathlib.Path.rename = lambda *_: os._exit(9)
    store(folder, dies_halfway if moment == "a piece" else pieces)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment_leaves_nothing_half(tmp_path, moment):
    child = multiprocessing.get_context("spawn").Process(target=die, args=(tmp_path, moment))
    child.start()
    child.join(60)
    assert child.exitcode == 9
    partial = [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
    assert len(partial) == 1, "it was writing"
    assert feature_store.find(tmp_path, KEY, LAYOUT) is None
    store(tmp_path, key={"other": 1})  # sweeps what nobody writes any more
    assert not partial[0].exists()
    check(store(tmp_path))


DAMAGE = ["truncate", "flip", "remove", "manifest", "deep", "header", "labels", "file", "link"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_cache_is_made_again(tmp_path, damage, caplog):
    store(tmp_path)
    path = tmp_path / feature_store.name_of(KEY)
    shard = path / ("labels.safetensors" if damage == "labels" else "00000.safetensors")
    content = bytearray(shard.read_bytes())
    if damage == "truncate":
        shard.write_bytes(content[:-1])
    elif damage in ("flip", "labels"):
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "remove":
        shard.unlink()
    elif damage == "manifest":
        (path / "manifest.json").write_text('{"files": 3}')
    elif damage == "deep":
        (path / "manifest.json").write_text("[" * 100_000)
        with pytest.raises(UserError, match="damaged"):
            store(tmp_path, never, limit=1, key={"other": 1})
    elif damage in ("file", "link"):
        shutil.rmtree(path)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "file").write_text("precious")
        path.symlink_to("elsewhere") if damage == "link" else path.write_text("")
    else:
        shard.write_bytes(b"\xff" * len(content))
    check(store(tmp_path))
    assert "damaged" in caplog.text
    check(store(tmp_path, never))
    if damage == "link":
        assert (tmp_path / "elsewhere" / "file").read_text() == "precious"


def test_another_cache_under_its_name_is_made_again(tmp_path, caplog):
    """Whole, with right checksums, and of other rows."""
    store(tmp_path)
    other = {"weights": "others", "boundary": 3}
    store(tmp_path, key=other)
    shutil.rmtree(tmp_path / feature_store.name_of(KEY))
    (tmp_path / feature_store.name_of(other)).rename(tmp_path / feature_store.name_of(KEY))
    check(store(tmp_path))
    assert "another cache's" in caplog.text


@pytest.mark.parametrize("change", ["dtype", "shape", "leaves", "labels", "shards"])
def test_a_cache_of_other_shapes_is_made_again(tmp_path, change, caplog):
    """Whoever wrote it: its checksums are right."""
    rows, first, second = LAYOUT.rows, *leaves()
    labels = LABELS[:EXAMPLES]
    shards = [[first, second]]
    if change == "dtype":
        shards = [[first.astype(np.float16), second]]
    elif change == "shape":
        shards = [[first[:, :2], second]]
    elif change == "leaves":
        shards = [[first, second, first]]
    elif change == "labels":
        labels = labels.astype(np.float32)
    else:
        shards = [[first[:3], second[:3]], [first[3:], second[3:]]]
    path = tmp_path / feature_store.name_of(KEY)
    path.mkdir()
    files = {}
    parts = [{str(i): leaf for i, leaf in enumerate(shard)} for shard in shards]
    for name, tensors in [
        *((f"{number:05d}.safetensors", part) for number, part in enumerate(parts)),
        ("labels.safetensors", {"labels": labels}),
    ]:
        content = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in tensors.items()})
        (path / name).write_bytes(content)
        files[name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (path / "manifest.json").write_text(json.dumps({"about": "", "key": KEY, "files": files}))
    assert sum(len(shard[0]) for shard in shards) == rows
    check(store(tmp_path))
    assert "damaged" in caplog.text


@pytest.mark.parametrize("name", [f"{feature_store.name_of(KEY)}.lock", ".tl_jax_room.lock"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused(tmp_path, name, kind):
    """A link would lead out of the folder, a pipe would be waited for."""
    folder, precious = tmp_path / "cache", tmp_path / "precious"
    folder.mkdir()
    precious.write_text("precious")
    if kind == "link":
        (folder / name).symlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).mkdir()
    with pytest.raises(UserError, match=name):
        store(folder, never)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("name", ["manifest.json", "00000.safetensors"])
def test_a_pipe_in_a_cache_is_damage(tmp_path, name, caplog):
    store(tmp_path)
    file = tmp_path / feature_store.name_of(KEY) / name
    file.unlink()
    os.mkfifo(file)
    check(store(tmp_path))
    assert "damaged" in caplog.text


def test_a_cache_names_no_file_outside(tmp_path, caplog):
    store(tmp_path)
    path = tmp_path / feature_store.name_of(KEY)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../elsewhere"] = {"bytes": 0, "crc32": 0}
    (path / "manifest.json").write_text(json.dumps(manifest))
    check(store(tmp_path))
    assert "no file of a cache" in caplog.text


def test_what_cannot_be_written_to_its_end_is_removed(tmp_path):
    def full():
        yield next(pieces())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(cache_folder.NoRoom, match="No space left"):
        store(tmp_path, full)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    check(store(tmp_path))


def test_a_folder_of_nobody(tmp_path):
    with pytest.raises(UserError, match="there is no such user"):
        store("~nosuchuser/cache", never)


def test_it_says_what_it_holds_and_refuses_beyond(tmp_path):
    store(tmp_path)
    held = sum(f.stat().st_size for f in (tmp_path / feature_store.name_of(KEY)).iterdir())
    with pytest.raises(UserError, match=r"config\.cache_limit_gb.*(?s:.)*the sample") as refused:
        store(tmp_path, never, limit=held + LAYOUT.nbytes - 1, key={"other": 1})
    assert feature_store.name_of(KEY) in str(refused.value)
    check(store(tmp_path, limit=held + LAYOUT.nbytes, key={"other": 1}))
    check(store(tmp_path, never, limit=1))  # what is there may stay and be used


def test_room_is_that_of_the_disk_too(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=LAYOUT.nbytes - 1))
    with pytest.raises(UserError, match=r"GB free on its disk"):
        store(tmp_path, never)


def test_room_for_all_is_asked_before_the_first(tmp_path):
    def ask(*keys, limit):
        caches = [(key, LAYOUT) for key in keys]
        feature_store.check_room(tmp_path, caches, limit, "both")

    other = {"other": 1}
    ask(KEY, other, limit=2 * LAYOUT.nbytes)
    with pytest.raises(UserError, match="both needs"):
        ask(KEY, other, limit=2 * LAYOUT.nbytes - 1)
    store(tmp_path)
    ask(KEY, limit=1)  # it is there
    held = sum(f.stat().st_size for f in (tmp_path / feature_store.name_of(KEY)).iterdir())
    ask(KEY, other, limit=held + LAYOUT.nbytes)
    with pytest.raises(UserError, match="in 1 caches"):
        ask(KEY, other, limit=held + LAYOUT.nbytes - 1)


def test_what_others_are_writing_counts(tmp_path):
    refused = []

    def slowly():
        for number, piece in enumerate(pieces()):
            if number == 1:
                with pytest.raises(UserError, match="being written") as error:
                    store(tmp_path, never, limit=2 * LAYOUT.nbytes - 1, key={"other": 1})
                refused.append(error.value)
            yield piece

    check(store(tmp_path, slowly))
    assert refused


def test_what_another_is_writing_is_waited_for_and_counts_once(tmp_path):
    """Room for one is enough where two ask for the same."""

    def slowly():
        for number, piece in enumerate(pieces()):
            if number == 1:
                caches = [(KEY, LAYOUT)]
                feature_store.check_room(tmp_path, caches, LAYOUT.nbytes, "the sample")
                caches.append(({"other": 1}, LAYOUT))
                with pytest.raises(UserError, match="being written"):
                    feature_store.check_room(tmp_path, caches, 2 * LAYOUT.nbytes - 1, "two")
            yield piece

    check(store(tmp_path, slowly, limit=LAYOUT.nbytes))


def test_what_a_killed_process_left_of_the_same_is_no_obstacle(tmp_path):
    side = tmp_path / f".{feature_store.name_of(KEY)}.part"
    side.mkdir(parents=True)
    (side / "needs").write_text(str(LAYOUT.nbytes))
    check(store(tmp_path, limit=LAYOUT.nbytes))


def test_what_is_promised_to_others_is_not_free(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=LAYOUT.nbytes))

    def slowly():
        with pytest.raises(UserError, match="0 GB free"):
            store(tmp_path, never, key={"other": 1})
        yield from pieces()

    check(store(tmp_path, slowly))


def test_a_link_to_nowhere_in_another_cache(tmp_path):
    store(tmp_path)
    (tmp_path / feature_store.name_of(KEY) / "link").symlink_to(tmp_path / "nowhere")
    check(store(tmp_path, key={"other": 1}))


def test_reading_needs_no_right_to_write(tmp_path, monkeypatch):
    """As another user: neither time stamps nor locks."""
    store(tmp_path)
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(cache_folder, "lock", refused)
    check(store(tmp_path, never))


def computes(folder, number):
    """Asks for a cache; leaves a file if it had to compute it."""

    def slowly():
        (folder / f"computed {number}").touch()
        for piece in pieces():
            time.sleep(0.1)
            yield piece

    (folder / f"ready {number}").touch()
    while len(list(folder.glob("ready *"))) < 2:
        time.sleep(0.01)
    check(store(folder / "cache", slowly))


def test_of_several_processes_one_computes_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=computes, args=(tmp_path, n)) for n in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert len(list(tmp_path.glob("computed *"))) == 1


def test_two_at_once_compute_it_once(tmp_path):
    computed, found = [], []

    def slowly():
        computed.append(1)
        for piece in pieces():
            time.sleep(0.02)
            yield piece

    def ask():
        found.append(store(tmp_path, slowly))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == 1
    for rows in found:
        check(rows)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"config\.cache_dir.*file"):
        store(tmp_path / "file")


def test_a_cache_of_other_rows_is_not_used(tmp_path):
    store(tmp_path)
    fewer = Layout(LAYOUT.name, 10, 10, LAYOUT.shapes)
    assert feature_store.find(tmp_path, KEY, fewer) is None


def test_the_manifest_says_what_it_is_for_people(tmp_path):
    store(tmp_path)
    manifest = json.loads((tmp_path / feature_store.name_of(KEY) / "manifest.json").read_text())
    assert manifest["about"] == "the sample"
    assert manifest["key"] == KEY
    shutil.rmtree(tmp_path / feature_store.name_of(KEY))
    check(store(tmp_path))


def test_what_is_none_of_its_own_is_left_alone(tmp_path):
    """A folder in use for other things: a home, a repository."""
    for name in (".git", ".ssh", "Documents", ".0123.part", "0" * 31):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("precious")
    (tmp_path / ("." + "a" * 32 + ".part")).symlink_to(tmp_path / "Documents")
    with pytest.raises(UserError, match="in 0 caches"):
        store(tmp_path, never, limit=1)
    check(store(tmp_path))
    check(store(tmp_path, key={"other": 1}))
    for name in (".git", ".ssh", "Documents", ".0123.part", "0" * 31):
        assert (tmp_path / name / "file").read_text() == "precious"
    assert not list(tmp_path.glob("c.lock")) and not (tmp_path / ".lock").exists()
