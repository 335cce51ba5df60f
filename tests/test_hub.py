"""Checkpoints from folders, from a local server that speaks as the Hub does, and from its cache."""

import hashlib
import http.server
import json
import os
import pathlib
import pickle
import re
import struct
import threading
import time

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants

from tl_jax import hub, tensor_files
from tl_jax.errors import UserError
from tl_jax.hub import PATIENCE, open_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RNG = np.random.default_rng(0)
TENSORS = {
    "vit.a.weight": RNG.normal(size=(3, 5)).astype(np.float32),
    "vit.b.weight": RNG.normal(size=(7,)).astype(np.float16),
    "vit.c.weight": RNG.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
    "vit.d.weight": RNG.normal(size=(2, 1, 2)),
    "num_batches_tracked": np.array(5),
    "vit.mask": np.array([True, False, True]),
    "vit.empty": np.zeros((0, 4), np.float32),
}


def make_folder(folder: pathlib.Path, weights: str = "model.safetensors") -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    (folder / "preprocessor_config.json").write_text('{"size": 224}')
    if weights == "model.safetensors":
        safetensors.numpy.save_file(TENSORS, folder / weights)
    elif weights:
        (folder / weights).write_bytes(b"never read")
    return folder


def make_shards(folder: pathlib.Path) -> pathlib.Path:
    make_folder(folder, "")
    names = sorted(TENSORS)
    weight_map = {}
    for i, part in enumerate((names[:3], names[3:]), 1):
        shard = f"model-0000{i}-of-00002.safetensors"
        safetensors.numpy.save_file({n: TENSORS[n] for n in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def check_tensors(checkpoint):
    assert checkpoint.tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        reader = checkpoint.tensors[name]
        assert reader.shape == expected.shape
        assert reader.dtype == reader.read().dtype == expected.dtype
        np.testing.assert_array_equal(reader.read(), expected)
        assert reader.to_bytes() == expected.tobytes()
        assert not reader.read().flags.writeable


def write_header(path: pathlib.Path, header, body: bytes = b"", length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def test_folder(tmp_path):
    folder = make_folder(tmp_path / "vit")
    checkpoint = open_checkpoint(str(folder))
    check_tensors(checkpoint)
    assert (checkpoint.source, checkpoint.revision) == (str(folder), None)
    assert checkpoint.folder == folder.resolve() and checkpoint.layout == "torch"
    assert checkpoint.config == {"model_type": "vit"} and checkpoint.processor == {"size": 224}
    content = (folder / "model.safetensors").read_bytes()
    assert checkpoint.sha256 == hashlib.sha256(content).hexdigest()


def test_relative_folder_and_home(tmp_path, monkeypatch):
    make_folder(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("owner/name", "./owner/name", "~/owner/name"):
        check_tensors(open_checkpoint(source))


def test_without_processor(tmp_path):
    folder = make_folder(tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    assert open_checkpoint(str(folder)).processor is None


def test_safetensors_is_preferred(tmp_path):
    folder = make_shards(make_folder(tmp_path / "vit"))
    (folder / "flax_model.msgpack").write_bytes(b"never read")
    assert [p.name for p in open_checkpoint(str(folder)).weight_files] == ["model.safetensors"]
    (folder / "model.safetensors").unlink()
    assert len(open_checkpoint(str(folder)).weight_files) == 2


def test_shards(tmp_path):
    folder = make_shards(tmp_path / "vit")
    checkpoint = open_checkpoint(str(folder))
    check_tensors(checkpoint)
    content = b"".join(p.read_bytes() for p in sorted(folder.glob("*.safetensors")))
    assert checkpoint.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack"])
def test_reading_takes_no_anonymous_memory(tmp_path, name):
    def anonymous() -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) << 10

    folder = make_folder(tmp_path / "vit", "")
    tree = {f"w{i}": np.full((1 << 20, 4), i, np.float32) for i in range(4)}  # 4 × 16 MiB
    if name == "model.safetensors":
        safetensors.numpy.save_file(tree, folder / name)
    else:
        (folder / name).write_bytes(flax.serialization.msgpack_serialize({"params": tree}))
    del tree
    growth, total, before = [], 0.0, anonymous()
    readers = open_checkpoint(str(folder)).tensors
    growth.append(anonymous() - before)
    for reader in readers.values():
        array = reader.read()
        total += float(array[::64].sum())
        growth.append(anonymous() - before)
        del array
    assert total == (1 << 16) * (0 + 1 + 2 + 3)
    assert growth[0] < 4 << 20
    # msgpack does not align its arrays: there one at a time may be copied
    assert max(growth) < (4 << 20 if name == "model.safetensors" else 20 << 20)


def test_real_weights_match_the_library():
    root = os.environ.get("TL_JAX_REAL_WEIGHTS")
    if not root:
        pytest.skip("TL_JAX_REAL_WEIGHTS is not set")
    for folder in sorted(p.parent for p in pathlib.Path(root).glob("*/model.safetensors")):
        checkpoint = open_checkpoint(str(folder))
        expected = safetensors.numpy.load_file(folder / "model.safetensors")
        assert checkpoint.tensors.keys() == expected.keys()
        for name, array in expected.items():
            assert checkpoint.tensors[name].to_bytes() == array.tobytes()
            assert checkpoint.tensors[name].dtype == array.dtype


# Flax's msgpack


def flax_tree():
    return {
        "params": {
            "vit": {"layer": {"0": {"kernel": RNG.normal(size=(4, 3)).astype(np.float32)}}},
            "classifier": {"bias": RNG.normal(size=70_000).astype(ml_dtypes.bfloat16)},
        },
        "batch_stats": {
            "mean": RNG.normal(size=(300,)).astype(np.float16),
            "n": np.int64(3),
            "x": np.float32(0.5),
        },
    }


@pytest.mark.parametrize("chunk", [2**30, 64])
def test_flax_msgpack(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
    folder, tree = make_folder(tmp_path / "vit", ""), flax_tree()
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.layout == "flax"
    expected = {
        "params/vit/layer/0/kernel": tree["params"]["vit"]["layer"]["0"]["kernel"],
        "params/classifier/bias": tree["params"]["classifier"]["bias"],
        "batch_stats/mean": tree["batch_stats"]["mean"],
        "batch_stats/n": np.asarray(tree["batch_stats"]["n"]),
        "batch_stats/x": np.asarray(tree["batch_stats"]["x"]),  # 16 bytes: a type of its own
    }
    assert checkpoint.tensors.keys() == expected.keys()
    for path, array in expected.items():
        reader = checkpoint.tensors[path]
        assert (reader.shape, reader.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(reader.read(), array)
        assert reader.to_bytes() == array.tobytes()


def test_every_msgpack_type_is_walked_as_the_library_does():
    values = [0, 127, -1, -32, 128, 255, 256, 65536, 2**40, -33, -200, -40_000, -(2**40), 1.5]
    values += [None, True, False, "", "a" * 31, "b" * 40, "c" * 300, "ü" * 70_000, [1] * 20]
    values += [{"k": [{}, []]}, {str(i): i for i in range(20)}, {str(i): 0 for i in range(66_000)}]
    data = np.frombuffer(msgpack.packb(values), np.uint8)
    assert tensor_files._Msgpack(data).value() == values
    for size in (0, 3, 300, 70_000):
        data = np.frombuffer(msgpack.packb(b"x" * size), np.uint8)
        assert tensor_files._Msgpack(data).value().tobytes() == b"x" * size


def array_bytes(shape, dtype, raw):
    return msgpack.ExtType(1, msgpack.packb([shape, dtype, raw]))


class Bomb:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": array_bytes([2], "float32", b"123")}, "cannot fill 3 bytes"),
        ({"a": array_bytes([-1], "float32", b"")}, "shape"),
        ({"a": array_bytes([1], "object", b"12345678")}, "unsupported dtype object"),
        ({"a": array_bytes([1], "V8", b"12345678")}, "unsupported dtype V8"),
        ({"a": array_bytes([1], ["float32"], b"1234")}, "corrupt"),
        ({"a": msgpack.ExtType(2, msgpack.packb([1.0, 2.0]))}, "unknown kind 2"),
        ({"a": msgpack.ExtType(1, pickle.dumps(Bomb()))}, "corrupt"),
        ({"a": 1}, "a is no array"),
        ({1: array_bytes([0], "float32", b"")}, "not a string"),
        ([1], "does not begin with a dictionary"),
        ({"a/b": array_bytes([0], "int8", b""), "a": {"b": array_bytes([0], "int8", b"")}}, "a/b"),
        ({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 1}, "chunks": {}}}, "chunks"),
        ({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 1}, "chunks": [3]}}, "corrupt"),
    ],
)
def test_bad_flax_msgpack(tmp_path, tree, message):
    folder = make_folder(tmp_path / "vit", "")
    (folder / "flax_model.msgpack").write_bytes(msgpack.packb(tree))
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(str(folder))
    assert "flax_model.msgpack" in str(error.value)


def test_flax_msgpack_truncated_anywhere(tmp_path):
    folder = make_folder(tmp_path / "vit", "")
    path = folder / "flax_model.msgpack"
    content = flax.serialization.msgpack_serialize({"params": {"a": np.ones((3, 4), np.float32)}})
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="truncated or corrupt"):
            open_checkpoint(str(folder))
    path.write_bytes(content + b"\0")
    with pytest.raises(UserError, match="follow the end"):
        open_checkpoint(str(folder))
    path.write_bytes(b"\xd7\x01" * 100_000)
    with pytest.raises(UserError, match="corrupt"):
        open_checkpoint(str(folder))


# Damaged folders


def test_safetensors_truncated_anywhere(tmp_path):
    folder = make_folder(tmp_path / "vit")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for size in (*range(0, 20), len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="truncated or corrupt") as error:
            open_checkpoint(str(folder))
        assert str(path) in str(error.value) and f"{size:,} bytes" in str(error.value)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{]", "not a safetensors header"),
        (b"\xff\xfe", "not a safetensors header"),
        (b"[" * 100_000, "not a safetensors header"),
        ([1], "not a safetensors header"),
        ({"a": 5}, "not a safetensors header"),
        ({"a": {"dtype": "F32"}}, "not a safetensors header"),
        ({"a": ENTRY | {"shape": [-2]}}, "not numbers"),
        ({"a": ENTRY | {"shape": [2.0]}}, "not numbers"),
        ({"a": ENTRY | {"shape": [True, 2]}}, "not numbers"),
        ({"a": ENTRY | {"dtype": "F7"}}, "unsupported dtype F7"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, "not a safetensors header"),
        ({"a": ENTRY | {"data_offsets": [0, 4]}}, r"a \[2\] float32 cannot fill 4 bytes"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, "cannot fill -8 bytes"),
        ({"a": ENTRY, "b": ENTRY}, "b overlaps"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, "4 bytes before a belong to no tensor"),
        ({"a": ENTRY | {"shape": [3], "data_offsets": [0, 12]}}, "end at byte 12 of 8"),
        ({"a": ENTRY | {"shape": [1], "data_offsets": [0, 4]}}, "end at byte 4 of 8"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2), "names twice: a"),
    ],
)
def test_bad_safetensors_header(tmp_path, header, message):
    folder = make_folder(tmp_path / "vit", "")
    write_header(folder / "model.safetensors", header, b"12345678")
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(str(folder))
    assert "model.safetensors" in str(error.value)


def test_all_problems_of_a_header_are_named(tmp_path):
    folder = make_folder(tmp_path / "vit", "")
    header = {"a": ENTRY, "b": ENTRY, "c": ENTRY | {"data_offsets": [12, 20]}}
    write_header(folder / "model.safetensors", header, b"12345678")
    with pytest.raises(UserError, match=r"b overlaps.*4 bytes before c.*20 of 8"):
        open_checkpoint(str(folder))


def test_unaligned_header_is_read(tmp_path):
    folder = make_folder(tmp_path / "vit", "")
    for pad in range(4):
        body = np.array([1, 2], np.float32).tobytes()
        write_header(
            folder / "model.safetensors", json.dumps({"a": ENTRY}).encode() + b" " * pad, body
        )
        np.testing.assert_array_equal(open_checkpoint(str(folder)).tensors["a"].read(), [1, 2])


def test_git_lfs_pointer(tmp_path):
    folder = make_folder(tmp_path / "vit", "")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match="git lfs pull"):
        open_checkpoint(str(folder))


def test_missing_files(tmp_path):
    folder = make_folder(tmp_path / "vit", "")
    with pytest.raises(UserError, match=r"holds no weights; expected one of model.safetensors"):
        open_checkpoint(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"vit holds no config\.json"):
        open_checkpoint(str(folder))
    with pytest.raises(UserError, match=r"There is no folder .*/none"):
        open_checkpoint(str(tmp_path / "none"))
    with pytest.raises(UserError, match="has no revision; got 'v1'"):
        open_checkpoint(str(folder), "v1")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickle_is_never_loaded(tmp_path, name):
    folder = make_folder(tmp_path / "vit", "")
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=rf"only as pickle \({name}\).*save_pretrained"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\xff", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_bad_json(tmp_path, name, content):
    folder = make_folder(tmp_path / "vit")
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=rf"/{name} (is not valid JSON|must hold a JSON object)"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    "shard",
    ["../out.safetensors", "/out.safetensors", "a/../../out.safetensors", "..\\out.safetensors"],
)
def test_index_that_points_outside(tmp_path, shard):
    folder = make_folder(tmp_path / "vit", "")
    safetensors.numpy.save_file(TENSORS, tmp_path / "out.safetensors")
    index = {"weight_map": dict.fromkeys(TENSORS, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names files outside its folder"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_index_without_a_map(tmp_path, index):
    folder = make_folder(tmp_path / "vit", "")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match='holds no "weight_map"'):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("shard", ["\ud800.safetensors", "a" * 5000 + ".safetensors"])
def test_index_with_what_is_no_file_name(tmp_path, shard):
    folder = make_folder(tmp_path / "vit", "")
    index = {"weight_map": dict.fromkeys(TENSORS, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no file name: '") as caught:
        open_checkpoint(str(folder))
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


def test_index_that_names_pickle(tmp_path):
    folder = make_folder(tmp_path / "vit", "pytorch_model.bin")
    index = {"weight_map": {"a": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"not safetensors: pytorch_model.bin"):
        open_checkpoint(str(folder))


def test_index_and_shards_disagree(tmp_path):
    folder = make_shards(tmp_path / "vit")
    second = folder / "model-00002-of-00002.safetensors"
    names = sorted(TENSORS)
    safetensors.numpy.save_file({n: TENSORS[n] for n in names[2:-1]}, second)
    with pytest.raises(UserError) as error:
        open_checkpoint(str(folder))
    assert f"{names[-1]} is not in {second.name}" in str(error.value)
    assert f"{second.name} also holds {names[2]}" in str(error.value)
    second.unlink()
    with pytest.raises(UserError, match=r"not there: model-00002-of-00002.safetensors"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_symlink_out_of_the_folder(tmp_path, name):
    folder = make_folder(tmp_path / "vit")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} leads out of the folder"):
        open_checkpoint(str(folder))
    link = tmp_path / "link"
    link.symlink_to(make_folder(tmp_path / "other"))
    check_tensors(open_checkpoint(str(link)))  # a link to the whole folder leads nowhere else


# The Hub, imitated


class Hub(http.server.ThreadingHTTPServer):
    """Serves `repos[id] = {file: bytes}` as the Hub does; `failures` first answers are 503."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.failures = 0
        self.gated = False
        self.fetched: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        hub = self.server
        if hub.failures > 0:
            hub.failures -= 1
            return self.answer(503)
        api = re.fullmatch(r"/api/models/(\w+/\w+)(?:/revision/(.+))?", self.path)
        file = re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/([^/?]+)", self.path)
        repo, revision = (api or file).group(1, 2)
        if repo not in hub.repos:
            return self.answer(401, X_Error_Code="RepoNotFound")
        if revision not in (None, "main", "v1", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = hub.repos[repo]
        if api:
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
            return self.answer(200, body, Content_Type="application/json")
        if hub.gated:
            return self.answer(403, X_Error_Code="GatedRepo")
        name = file[3]
        if name not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        if self.command == "GET":
            hub.fetched.append(name)
        etag = hashlib.sha256(files[name]).hexdigest()
        return self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


def set_endpoint(monkeypatch, endpoint: str):
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.6)
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        set_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server
        server.shutdown()
        thread.join()


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_hub_download_then_cache(tmp_path, server, monkeypatch):
    server.repos["a/b"] = content(make_folder(tmp_path / "vit")) | {
        "pytorch_model.bin": pickle.dumps(Bomb()),
        "flax_model.msgpack": b"not needed",
    }
    server.failures = 1
    checkpoint = open_checkpoint("a/b")
    check_tensors(checkpoint)
    assert (checkpoint.source, checkpoint.revision, checkpoint.layout) == ("a/b", COMMIT, "torch")
    assert checkpoint.folder.is_relative_to(tmp_path / "cache")
    assert sorted(server.fetched) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    open_checkpoint("a/b")
    assert len(server.fetched) == 3, "the second time everything comes from the cache"
    check_tensors(open_checkpoint(str(checkpoint.folder)))  # its symlinks lead to the cache's blobs

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint("a/b").revision == COMMIT
    check_tensors(open_checkpoint("a/b", COMMIT))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert open_checkpoint("a/b").processor == {"size": 224}


def test_hub_shards_of_a_revision(tmp_path, server):
    server.repos["a/b"] = content(make_shards(tmp_path / "vit"))
    checkpoint = open_checkpoint("a/b", "v1")
    check_tensors(checkpoint)
    assert checkpoint.revision == COMMIT and len(checkpoint.weight_files) == 2


def test_hub_index_that_points_outside(tmp_path, server):
    folder = make_folder(tmp_path / "vit", "")
    index = {"weight_map": {"a": "../../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    server.repos["a/b"] = content(folder)
    with pytest.raises(UserError, match="outside its folder"):
        open_checkpoint("a/b")


def test_hub_flax(tmp_path, server):
    folder, tree = make_folder(tmp_path / "vit", ""), flax_tree()
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    server.repos["a/b"] = content(folder)
    assert open_checkpoint("a/b").layout == "flax"


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("a/none", None, "a/none is neither a folder here nor a model on"),
        ("a/vit", "v9", "a/vit is on the Hub, but has no revision 'v9'"),
        ("a/pickle", None, "only as pickle"),
        ("a/empty", None, "holds no config.json"),
        ("a b", None, "neither a folder nor a Hub id"),
    ],
)
def test_hub_errors(tmp_path, server, source, revision, message):
    server.repos["a/vit"] = content(make_folder(tmp_path / "vit"))
    server.repos["a/pickle"] = content(make_folder(tmp_path / "p", "pytorch_model.bin"))
    server.repos["a/empty"] = {"README.md": b""}
    with pytest.raises(UserError, match=message):
        open_checkpoint(source, revision)


def test_hub_gated(tmp_path, server):
    server.repos["a/b"] = content(make_folder(tmp_path / "vit"))
    server.gated = True
    with pytest.raises(UserError, match="a/b is gated: accept its terms"):
        open_checkpoint("a/b")


def test_hub_down_fails_within_seconds(server):
    server.failures = 10_000
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"a/b is no folder here, not in the cache .* cannot be downloaded .*503"
    ):
        open_checkpoint("a/b")
    assert time.monotonic() - start < 5


def test_no_network_fails_within_seconds(server, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", PATIENCE)
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError, match="copy FOLDER here"):
        open_checkpoint("a/b", "v1")
    assert time.monotonic() - start < 10


def test_offline_without_cache(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"not in the cache .*HF_HUB_OFFLINE is set"):
        open_checkpoint("a/b")
    with pytest.raises(UserError, match="neither a folder nor a Hub id"):
        open_checkpoint("a b")


def test_half_a_download_is_not_a_checkpoint(tmp_path, server, monkeypatch):
    server.repos["a/b"] = content(make_folder(tmp_path / "vit"))
    folder = open_checkpoint("a/b").folder
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the cache"):
        open_checkpoint("a/b")
