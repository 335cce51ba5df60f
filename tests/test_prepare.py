"""Raw files → TFDS data sets: what is written, and what is refused."""

import gzip
import hashlib
import http.server
import io
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from tl_jax import downloads, image_files, prepare, tfds_writer
from tl_jax.datasets import open_dataset
from tl_jax.errors import UserError

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
SIZES = {"train": 23, "t10k": 11}


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + (array.tobytes())
    )


def arrays(size=28, classes=10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for prefix, count in SIZES.items():
        made[f"{prefix}-images-idx3-ubyte"] = rng.integers(
            0, 256, (count, size, size), dtype=np.uint8
        )
        made[f"{prefix}-labels-idx1-ubyte"] = (np.arange(count) % classes).astype(np.uint8)
    return made


def write_idx(folder: pathlib.Path, made=None, compress=True) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (made or arrays()).items():
        content = idx(array)
        path = folder / (name + ".gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return folder


def encoded(image: np.ndarray | Image.Image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


def noise(*shape) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def smooth(height, width) -> np.ndarray:
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return ramp.astype(np.uint8)


def run(*arguments, environment=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tl_jax.prepare", *map(str, arguments)]
    environment = os.environ | (environment or {})
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


ROOT = pathlib.Path(prepare.__file__).resolve().parents[1]


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist", "mnist", "small_digits"])
def test_idx(tmp_path, name, compress):
    made = arrays(8 if name == "small_digits" else 28, 7 if name == "small_digits" else 10)
    source = write_idx(tmp_path / "idx", made, compress)
    folder = prepare.prepare(name, str(source), str(tmp_path / "data"))
    found = tfds.data_source(name, data_dir=str(tmp_path / "data"), download=False)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = made[f"{prefix}-images-idx3-ubyte"]
        labels = made[f"{prefix}-labels-idx1-ubyte"]
        assert len(found[split]) == SIZES[prefix]
        for i, example in enumerate(found[split]):
            np.testing.assert_array_equal(example["image"][..., 0], images[i])
            assert example["image"].shape == (*images.shape[1:], 1)
            assert example["label"] == labels[i]
    info = tfds.builder(name, data_dir=str(tmp_path / "data")).info
    names = info.features["label"].names
    expected = {"fashion_mnist": "T-shirt/top", "kmnist": "o"}.get(name, "0")
    assert names[0] == expected and len(names) == (7 if name == "small_digits" else 10)
    assert info.features["image"].shape == (*images.shape[1:], 1)
    version = "1.0.0" if name == "small_digits" else "3.0.1"
    assert folder == tmp_path / "data" / name / version
    assert "tensorflow" not in sys.modules


def test_our_own_reader_finds_it(tmp_path):
    made = arrays()
    prepare.prepare("fashion_mnist", str(write_idx(tmp_path / "idx", made)), str(tmp_path / "d"))
    opened = open_dataset(
        "tfds:fashion_mnist", {"train": "train[5:15]", "test": "test"}, str(tmp_path / "d")
    )
    assert opened["train"].class_names[9] == "Ankle boot"
    assert opened["train"].image_shape == (28, 28, 1)
    np.testing.assert_array_equal(
        np.asarray(opened["train"][2]["image"])[..., 0], made["train-images-idx3-ubyte"][7]
    )
    assert [len(opened[split]) for split in ("train", "test")] == [10, 11]


def test_preparing_again(tmp_path, capsys):
    source = write_idx(tmp_path / "idx")
    folder = prepare.prepare("digits_again", str(source), str(tmp_path / "data"))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare.prepare("digits_again", str(source), str(tmp_path / "data")) == folder
    assert "already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    made = arrays()
    made["t10k-labels-idx1-ubyte"][3] ^= 1
    other = write_idx(tmp_path / "other", made)
    with pytest.raises(UserError, match="already holds a data set of that name, made from other"):
        prepare.prepare("digits_again", str(other), str(tmp_path / "data"))
    (folder / tfds_writer.SOURCE).unlink()
    with pytest.raises(UserError, match="not made by this command"):
        prepare.prepare("digits_again", str(source), str(tmp_path / "data"))
    for shard in folder.glob("*array_record*"):
        shard.unlink()
    with pytest.raises(UserError, match="another file format"):
        prepare.prepare("digits_again", str(source), str(tmp_path / "data"))


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(**_):
        raise KeyboardInterrupt

    source = write_idx(tmp_path / "idx")
    with monkeypatch.context() as patch:
        patch.setattr(tfds.folder_dataset, "write_metadata", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare("digits_failed", str(source), str(tmp_path / "data"))
    assert not list((tmp_path / "data" / "digits_failed").iterdir())
    # what a killed run leaves does not look prepared, and is not in the way
    side = tmp_path / "data" / "digits_failed" / "incomplete.1234_1.0.0"
    side.mkdir()
    (side / "digits_failed-train.array_record-00000-of-00001").write_bytes(b"")
    with pytest.raises(tfds.core.DatasetNotFoundError):
        tfds.data_source("digits_failed", data_dir=str(tmp_path / "data"), download=False)
    prepare.prepare("digits_failed", str(source), str(tmp_path / "data"))
    found = tfds.data_source("digits_failed", data_dir=str(tmp_path / "data"), download=False)
    assert len(found["train"]) == SIZES["train"]


def test_the_other_process_was_faster(tmp_path, monkeypatch):
    source = write_idx(tmp_path / "idx")
    real, inner = tfds_writer._write, []

    def slow(*arguments):
        if not inner:
            inner.append(True)
            prepare.prepare("digits_race", str(source), str(tmp_path / "data"))
        real(*arguments)

    monkeypatch.setattr(tfds_writer, "_write", slow)
    folder = prepare.prepare("digits_race", str(source), str(tmp_path / "data"))
    assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]


def broken(name: str, content: bytes):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / f"{name}.gz").unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return spoil


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / f"{IMAGES}.gz").unlink(), rf"has no {IMAGES}\[\.gz\]"),
        (broken(IMAGES, b""), "does not begin as an idx3-ubyte file"),
        (broken(IMAGES, idx(np.zeros(5, np.uint8))), "does not begin as an idx3-ubyte file"),
        (broken(IMAGES, idx(noise(23, 28, 28))[:-1]), r"\[23, 28, 28\] = 18,032 .* only 18,031"),
        (broken(IMAGES, idx(noise(23, 28, 28)) + b"x"), "holds more"),
        (broken(IMAGES, idx(noise(22, 28, 28))), "holds 22 images, .* 23 labels"),
        (broken(IMAGES, idx(noise(23, 28, 27))), "another size than train's"),
        (broken(IMAGES, idx(noise(23, 28, 0))), "holds no images"),
        (broken(IMAGES, b"\0\0\x08\x03" + b"\xff" * 12), "is more than 8,589,934,592 bytes"),
        (broken(IMAGES, b"\0\0\x08\x03" + struct.pack(">3I", 1 << 23, 28, 28)), "holds only 0"),
        (broken(f"{LABELS}.gz", b"no gzip"), rf"{LABELS}\.gz: Not a gzipped file"),
        (broken(f"{LABELS}.gz", gzip.compress(idx(noise(11)))[:-9]), rf"{LABELS}\.gz: "),
        (broken(LABELS, idx(np.full(11, 12, np.uint8))), "one of TFDS's own .* with classes"),
    ],
)
def test_bad_idx(tmp_path, spoil, message):
    source = write_idx(tmp_path / "idx")
    spoil(source)
    with pytest.raises(UserError, match=message):
        prepare.prepare("mnist", str(source), str(tmp_path / "data"))
    assert not list((tmp_path / "data").rglob("*array_record*"))


def test_all_bad_idx_files_are_named(tmp_path):
    source = write_idx(tmp_path / "idx")
    broken(IMAGES, b"")(source)
    broken(LABELS, b"")(source)
    with pytest.raises(UserError, match=f"{IMAGES}: .*{LABELS}: "):
        prepare.prepare("mnist", str(source), str(tmp_path / "data"))


def test_idx_that_leads_out_of_the_folder(tmp_path):
    source = write_idx(tmp_path / "idx")
    path = source / f"{IMAGES}.gz"
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    with pytest.raises(UserError, match="leaves the folder is refused"):
        prepare.prepare("mnist", str(source), str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("Bad-Name", "idx", "is no name for a data set"),
        ("../out", "idx", "is no name for a data set"),
        ("digits", "none", "There is no .*none"),
        ("digits", "idx/train-images-idx3-ubyte.gz", "is a file; give the folder"),
        ("cifar10", "idx", r"TFDS's own data sets; .* with the features id, image, label"),
        ("kmnist", "small", r"images of shape \(28, 28, 1\), not \(8, 8, 1\)"),
        ("eurosat", "idx", "TFDS's own data sets"),
    ],
)
def test_bad_requests(tmp_path, name, source, message):
    write_idx(tmp_path / "idx")
    write_idx(tmp_path / "small", arrays(8))
    with pytest.raises(UserError, match=message):
        prepare.prepare(name, str(tmp_path / source), str(tmp_path / "data"))
    with pytest.raises(UserError, match="prepare into a local folder"):
        prepare.prepare("mnist", str(tmp_path / "idx"), "gs://bucket/data")


# Folders of images


def image_folder(root: pathlib.Path, images: dict[str, bytes]) -> pathlib.Path:
    for name, content in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def rotated(array: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(array, "JPEG", quality=95, exif=exif)


def test_folder_of_one_size(tmp_path):
    pixels = noise(10, 6, 5, 3)
    images = {f"{'ac'[i % 2]}at/{i:02}.png": encoded(pixels[i]) for i in range(10)}
    images |= {"cat/raw.jpg": encoded(smooth(6, 5), "JPEG", quality=95), "cat/.hidden.png": b"?"}
    images |= {"cat/notes.txt": b"not an image"}
    source = image_folder(tmp_path / "pets", images)
    folder = prepare.prepare("pets", str(source), str(tmp_path / "data"))
    builder = tfds.builder("pets", data_dir=str(tmp_path / "data"))
    assert builder.info.features["image"].shape == (6, 5, 3)
    assert builder.info.features["label"].names == ["aat", "cat"]
    ours = open_dataset("tfds:pets", {"train": "train"}, str(tmp_path / "data"))["train"]
    theirs = open_dataset(f"folder:{source}", {"train": "train"}, None)["train"]
    assert len(ours) == len(theirs) == 11
    for a, b in zip(ours.get(range(11)), theirs.get(range(11)), strict=True):
        assert a["label"] == b["label"]
        np.testing.assert_array_equal(np.asarray(a["image"]), np.asarray(b["image"]))
    labels = [int(example["label"]) for example in builder.as_data_source("train")]
    assert labels != sorted(labels), "class by class: a slice would hold one class only"
    shard = ArrayRecordReader(str(next(folder.glob("*array_record*"))))
    assert any(images["cat/raw.jpg"] in record for record in shard.read_all()), "bytes are kept"


def test_folder_of_many_sizes_modes_and_formats(tmp_path):
    see_through = np.full((4, 4, 4), 0, np.uint8)
    images = {
        "train/a/0.png": encoded(noise(6, 5, 3)),
        "train/a/1.jpg": rotated(smooth(8, 4)),
        "train/a/deeper/2.bmp": encoded(noise(3, 9, 3), "BMP"),
        "train/b/3.png": encoded(noise(7, 7)),
        "train/b/4.png": encoded(see_through),
        "train/b/5.png": encoded(Image.fromarray(noise(5, 5, 3)).quantize(16)),
        "val/a/6.webp": encoded(noise(5, 6, 3), "WEBP", lossless=True),
        "test/b/7.jpg": encoded(Image.fromarray(smooth(5, 5)).convert("CMYK"), "JPEG"),
    }
    source = image_folder(tmp_path / "mixed", images)
    prepare.prepare("mixed", str(source), str(tmp_path / "data"))
    builder = tfds.builder("mixed", data_dir=str(tmp_path / "data"))
    assert builder.info.features["image"].shape == (None, None, 3)
    assert {s: i.num_examples for s, i in builder.info.splits.items()} == {
        "train": 6,
        "validation": 1,
        "test": 1,
    }
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        expected = {
            image_files.decode(content).convert("RGB").tobytes()
            for path, content in images.items()
            if path.startswith(name)
        }
        found = {example["image"].tobytes() for example in builder.as_data_source(split)}
        assert found == expected
    shapes = {example["image"].shape for example in builder.as_data_source("train")}
    assert (4, 8, 3) in shapes, "the rotated image stands upright"


def test_gray_folder_has_one_channel(tmp_path):
    images = {f"{i % 2}/{i}.png": encoded(noise(4, 4 + i)) for i in range(4)}
    prepare.prepare("gray", str(image_folder(tmp_path / "g", images)), str(tmp_path / "data"))
    builder = tfds.builder("gray", data_dir=str(tmp_path / "data"))
    assert builder.info.features["image"].shape == (None, None, 1)
    assert all(e["image"].shape[2] == 1 for e in builder.as_data_source("train"))


def test_unreadable_images_are_named_and_counted(tmp_path):
    middle = bytearray(encoded(noise(40, 40, 3)))
    middle[len(middle) // 2] ^= 0xFF
    images = {
        "a/good.png": encoded(noise(6, 5, 3)),
        "a/empty.jpg": b"",
        "a/text.png": b"hello",
        "b/short.jpg": encoded(noise(60, 50, 3), "JPEG")[:-900],
        "b/middle.png": bytes(middle),
    }
    source = image_folder(tmp_path / "bad", images)
    with pytest.raises(UserError) as error:
        prepare.prepare("bad", str(source), str(tmp_path / "data"))
    assert re.search("[34] of [45] images", str(error.value))
    assert str(error.value).endswith("Mend or remove them."), "prepare has no option to skip them"
    for name in ("empty.jpg", "text.png", "short.jpg"):
        assert name in str(error.value)
    for name in ("empty.jpg", "text.png", "short.jpg"):
        next(source.rglob(name)).unlink()
    with pytest.raises(UserError, match=r"1 of 2 images .*middle\.png"):
        prepare.prepare("bad", str(source), str(tmp_path / "data"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused(tmp_path):
    bomb = encoded(Image.new("1", (12_000, 12_000)))
    source = image_folder(tmp_path / "b", {"a/bomb.png": bomb, "b/x.png": encoded(noise(4, 4))})
    with pytest.raises(UserError, match=r"bomb\.png \(.*(too large|pixels)"):
        prepare.prepare("bombs", str(source), str(tmp_path / "data"))


def test_links_out_of_the_folder_are_refused(tmp_path):
    secret = image_folder(tmp_path / "secret", {"s.png": encoded(noise(4, 4))})
    source = image_folder(tmp_path / "pets", {f"{c}/x.png": encoded(noise(4, 4)) for c in "ab"})
    (source / "a" / "link.png").symlink_to(secret / "s.png")
    with pytest.raises(UserError, match=r"link\.png is a symbolic link out of"):
        prepare.prepare("pets", str(source), str(tmp_path / "data"))


# Cats and dogs


def pets() -> dict[str, bytes]:
    made: dict[str, bytes] = {}
    for i in range(12):
        made[f"PetImages/Cat/{i}.jpg"] = encoded(smooth(9 + i, 8), "JPEG")
        made[f"PetImages/Dog/{i}.jpg"] = encoded(smooth(7, 10 + i)[::-1], "JPEG")
    made["PetImages/Dog/5.jpg"] = made["PetImages/Dog/5.jpg"].replace(b"JFIF", b"XXXX")
    made["PetImages/Cat/6.jpg"] = made["PetImages/Cat/6.jpg"][:100]
    made["PetImages/Cat/7.jpg"] = encoded(smooth(9, 9)[..., 0], "JPEG")
    made["PetImages/Cat/Thumbs.db"] = b"?"
    return made


def pet_zip(path: pathlib.Path, extra=()) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (*pets().items(), *extra):
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("kind", ["zip", "beside", "folder", "inner"])
def test_cats_vs_dogs(tmp_path, capsys, kind):
    if kind in ("zip", "beside"):
        extra = (("../out.jpg", b"x"), ("/abs/PetImages/Cat/1.jpg", b"x"), ("readme", b"x"))
        source = pet_zip(tmp_path / "kagglecatsanddogs_5340.zip", extra)
        source = source if kind == "zip" else source.parent
    else:
        source = image_folder(tmp_path / "unzipped", pets())
        source = source / "PetImages" if kind == "inner" else source
    folder = prepare.prepare("cats_vs_dogs", str(source), str(tmp_path / "data"))
    assert folder.name == "4.0.1"
    out = capsys.readouterr().out
    assert "1 images without a JFIF header and 1 damaged ones were left out" in out
    found = tfds.data_source("cats_vs_dogs", data_dir=str(tmp_path / "data"), download=False)
    examples = {e["image/filename"].decode(): e for e in found["train"]}
    good = {n: c for n, c in pets().items() if n.endswith("g")}
    del good["PetImages/Dog/5.jpg"], good["PetImages/Cat/6.jpg"]
    assert examples.keys() == good.keys()
    for name, content in good.items():
        assert examples[name]["label"] == ("Dog" in name)
        expected = image_files.decode(content).convert("RGB")
        np.testing.assert_array_equal(examples[name]["image"], np.asarray(expected))
    labels = [int(e["label"]) for e in found["train"]]
    assert labels != sorted(labels)
    assert not list(tmp_path.rglob("out.jpg"))


def test_bad_cats_vs_dogs(tmp_path):
    path = pet_zip(tmp_path / "pets.zip")
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"pets\.zip is damaged"):
        prepare.prepare("cats_vs_dogs", str(path), str(tmp_path / "data"))
    content[200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"pets\.zip is damaged"):
        prepare.prepare("cats_vs_dogs", str(path), str(tmp_path / "data"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(UserError, match="holds no usable PetImages"):
        prepare.prepare("cats_vs_dogs", str(path), str(tmp_path / "data"))
    source = image_folder(tmp_path / "unzipped", pets())
    os.mkfifo(source / "PetImages" / "Cat" / "98.jpg")
    with pytest.raises(UserError, match=r"what is no file.*98\.jpg"):
        prepare.prepare("cats_vs_dogs", str(source), str(tmp_path / "data"))
    (source / "PetImages" / "Cat" / "98.jpg").unlink()
    (tmp_path / "out.jpg").write_bytes(encoded(smooth(4, 4), "JPEG"))
    (source / "PetImages" / "Cat" / "99.jpg").symlink_to(tmp_path / "out.jpg")
    with pytest.raises(UserError, match=r"Links that leave the folder.*99\.jpg"):
        prepare.prepare("cats_vs_dogs", str(source), str(tmp_path / "data"))


# Downloads


class Server(http.server.ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cuts = 0  # this many answers stop half way
        self.requests: list[tuple[str, str | None]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append((self.path, wanted))
        if self.path not in server.files:
            return self.send_error(404)
        content = server.files[self.path]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(content):
            return self.send_error(416)
        content = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if server.cuts > 0:
            server.cuts -= 1
            content = content[: len(content) // 2]
        if self.command == "GET":
            self.wfile.write(content)
        return None

    do_HEAD = do_GET


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()
        thread.join()


def serve(server, monkeypatch, files: dict[str, bytes]) -> None:
    server.files = {f"/{name}": content for name, content in files.items()}
    known = {
        f"{server.url}/{name}": types.SimpleNamespace(
            size=len(content), checksum=hashlib.sha256(content).hexdigest(), filename=name
        )
        for name, content in files.items()
    }
    monkeypatch.setattr(downloads, "known_files", lambda _: known)
    monkeypatch.setattr(downloads.time, "sleep", lambda _: None)


def test_download_and_prepare(tmp_path, server, monkeypatch):
    files = {p.name: p.read_bytes() for p in write_idx(tmp_path / "idx").iterdir()}
    serve(server, monkeypatch, files)
    server.cuts = 5
    folder = prepare.prepare("fashion_mnist", None, str(tmp_path / "data"))
    assert any(wanted for _, wanted in server.requests), "a cut download goes on where it stopped"
    found = tfds.data_source("fashion_mnist", data_dir=str(tmp_path / "data"), download=False)
    assert len(found["train"]) == SIZES["train"]
    assert not list((tmp_path / "data").rglob("*.gz"))
    count = len(server.requests)
    assert prepare.prepare("fashion_mnist", None, str(tmp_path / "data")) == folder
    assert len(server.requests) == count, "what is prepared is not downloaded"


def test_download_of_cats_vs_dogs(tmp_path, server, monkeypatch):
    content = pet_zip(tmp_path / "pets.zip").read_bytes()
    serve(server, monkeypatch, {"kagglecatsanddogs_5340.zip": content})
    prepare.prepare("cats_vs_dogs", None, str(tmp_path / "data"))
    found = tfds.data_source("cats_vs_dogs", data_dir=str(tmp_path / "data"), download=False)
    assert len(found["train"]) == 22


def test_download_with_another_content(tmp_path, server, monkeypatch):
    serve(server, monkeypatch, {"a.gz": b"right", "b.gz": b"right"})
    server.files["/b.gz"] = b"wrong"
    with pytest.raises(UserError, match=r"b\.gz is not the file that was expected"):
        prepare.prepare("mnist", None, str(tmp_path / "data"))
    names = {p.name for p in (tmp_path / "data").rglob("*") if p.is_file()}
    assert names == {"a.gz"}, "the good file is kept, the bad one is not"


def test_download_that_is_not_there(tmp_path, server, monkeypatch):
    serve(server, monkeypatch, {"a.gz": b"right"})
    server.files.clear()
    with pytest.raises(UserError, match="404") as error:
        prepare.prepare("mnist", None, str(tmp_path / "data"))
    assert len(server.requests) == 1, "a refusal is not tried again"
    assert "a.gz\ninto a folder" in str(error.value)


def test_no_network(tmp_path, server, monkeypatch):
    serve(server, monkeypatch, {"a.gz": b"right"})
    monkeypatch.setattr(
        downloads,
        "known_files",
        lambda _: {
            "http://127.0.0.1:9/a.gz": types.SimpleNamespace(size=1, checksum="0", filename="a.gz")
        },
    )
    start = time.monotonic()
    with pytest.raises(UserError, match="Connection refused") as error:
        prepare.prepare("mnist", None, str(tmp_path / "data"))
    assert time.monotonic() - start < 5
    command = f"python -m tl_jax.prepare mnist --from FOLDER --data-dir {tmp_path / 'data'}"
    assert command in str(error.value)
    assert not (tmp_path / "data").exists()


def test_known_addresses():
    for name in prepare.DOWNLOADED:
        files = downloads.known_files(name)
        assert len(files) == (1 if name == "cats_vs_dogs" else 4)
        assert all(len(info.checksum) == 64 and info.filename for info in files.values())


def test_reachable(server):
    assert downloads.reachable(["http://127.0.0.1:9/x", f"{server.url}/missing"])
    assert not downloads.reachable(["http://127.0.0.1:9/x", "no address"])


# TFDS's own builders


def test_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError) as error:
        prepare.prepare("cifar10", None, str(tmp_path))
    assert 'pip install -e ".[tensorflow]"' in str(error.value)
    assert f"python -m tl_jax.prepare cifar10 --data-dir {tmp_path}" in str(error.value)


def test_unknown_name(tmp_path):
    with pytest.raises(UserError, match=r"no data set 'cifar1O' \(it knows .*cifar10.*--from"):
        prepare.prepare("cifar1O", None, str(tmp_path))


def test_the_advice_for_a_version_that_is_not_there_works(tmp_path):
    advice = f"python -m tl_jax.prepare digits --from FOLDER --data-dir {tmp_path}"
    with pytest.raises(UserError, match=f"no data set 'digits:9.9.9'.*{re.escape(advice)}$"):
        prepare.prepare("digits:9.9.9", None, str(tmp_path))


def test_with_tensorflow(tmp_path, monkeypatch):
    calls = []

    class Builder:
        data_dir = tmp_path / "cifar10"

        def download_and_prepare(self):
            calls.append("prepared")

    def builder(name, **options):
        calls.append((name, options))
        return Builder()

    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(downloads, "reachable", lambda urls: False)
    with pytest.raises(UserError, match=r"cifar.*\.gz cannot be reached"):
        prepare.prepare("cifar10", None, str(tmp_path))
    monkeypatch.setattr(downloads, "reachable", lambda urls: True)
    monkeypatch.setattr(tfds, "builder", builder)
    assert prepare.prepare("cifar10", None, str(tmp_path)) == tmp_path / "cifar10"
    expected = {"data_dir": str(tmp_path), "file_format": "array_record"}
    assert calls == [("cifar10", expected), "prepared"]


# The command line


def test_command(tmp_path, capsys):
    source = write_idx(tmp_path / "idx")
    done = run("kmnist", "--from", source, "--data-dir", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert "Prepared kmnist (23 train, 11 test; 10 classes)" in done.stdout
    missing = tmp_path / "none"
    assert prepare.main(["kmnist", f"--from={missing}", f"--data-dir={tmp_path}"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: There is no {missing}."]


def test_names_that_are_not_utf8(tmp_path, capsys):
    images = {"a/0.png": encoded(noise(4, 4)), "b/\udcff.png": encoded(noise(5, 5))}
    source = image_folder(tmp_path / "images", images)
    data = f"--data-dir={tmp_path / 'data'}"
    assert prepare.main(["mine", f"--from={source}", data]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "b/\\udcff.png' has a name that is not UTF-8" in line
    assert prepare.main(["mine", f"--from={source}/\udcff", data]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "\\udcff' is not UTF-8" in line


def test_a_terminal_that_knows_ascii_only(tmp_path):
    missing = tmp_path / "Käfer"
    done = run("kmnist", "--from", missing, environment={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (2, f"error: There is no {tmp_path}/K\\xe4fer.\n")


def test_no_permission(tmp_path, capsys):
    (tmp_path / "data").write_text("a file")
    source = write_idx(tmp_path / "idx")
    code = prepare.main(["digits", "--from", str(source), "--data-dir", str(tmp_path / "data")])
    assert code == 2
    assert re.search(r"error: .*data.*: Not a directory", capsys.readouterr().err)


def test_in_subprocess(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "default"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="TFDS knows no data set 'no_such_set'"):
        prepare.prepare_in_subprocess("no_such_set", None)
    assert "Traceback" not in capfd.readouterr().err
    prepare.prepare("mnist", str(write_idx(tmp_path / "idx")), None)
    prepare.prepare_in_subprocess("mnist", None)
    assert f"already prepared in {tmp_path / 'default'}" in capfd.readouterr().out.replace(
        "\n", " "
    )


def test_a_child_that_dies(monkeypatch):
    monkeypatch.setattr(prepare.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="Preparing mnist ended with exit code 1"):
        prepare.prepare_in_subprocess("mnist")


@pytest.mark.skipif(not DEBIAN.exists(), reason="dataset-fashion-mnist is not installed")
def test_debian_package(tmp_path):
    start = time.monotonic()
    prepare.prepare("fashion_mnist", str(DEBIAN), str(tmp_path))
    assert time.monotonic() - start < 60
    found = tfds.data_source("fashion_mnist", data_dir=str(tmp_path), download=False)
    assert (len(found["train"]), len(found["test"])) == (60_000, 10_000)
    with gzip.open(DEBIAN / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 28, 28)
    for i in (0, 1234, 9999):
        np.testing.assert_array_equal(found["test"][i]["image"][..., 0], images[i])
    info = json.loads((tmp_path / "fashion_mnist/3.0.1/dataset_info.json").read_text())
    assert os.fspath(tmp_path) not in json.dumps(info), "it can be moved"
