"""Weight files as named, memory-mapped arrays: safetensors and Flax's msgpack.

Both formats hold plain bytes, so nothing in a file can run. Every header is checked against the
file before an array is handed out: its bytes lie inside the file and are as many as shape and
dtype say. Formats: https://huggingface.co/docs/safetensors (the header) and
https://github.com/msgpack/msgpack/blob/master/spec.md with the extension types of
`flax.serialization`.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import struct
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from tl_jax.errors import UserError

SAFETENSORS_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_FLAX_DTYPES = {dtype.name: dtype for dtype in SAFETENSORS_DTYPES.values()}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_MAX_DEPTH = 64
_FLAX_ARRAYS = (1, 3)  # flax.serialization._MsgpackExtType: ndarray, npscalar
# struct formats of the numbers and of the lengths that follow a msgpack type byte
_NUMBERS = dict(zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True))
_SIZES = dict(zip((*range(0xC4, 0xCA), *range(0xD9, 0xE0)), "BHIBHIBHIHIHI", strict=True))
_CHUNKED = "__msgpack_chunked_array__"


@dataclasses.dataclass(frozen=True, eq=False)
class TensorReader:
    """One array in a weight file; its bytes are paged in only when they are used.

    Attributes:
      shape: as in the file.
      dtype: as in the file (`ml_dtypes.bfloat16` for BF16), little endian.
      pieces: the memory-mapped bytes, uint8, usually one piece.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[np.ndarray, ...]

    def read(self) -> np.ndarray:
        """The array, `shape` and `dtype`, read-only; a view of the file where that is possible."""
        raw = self.pieces[0] if len(self.pieces) == 1 else np.concatenate(self.pieces)
        if raw.ctypes.data % self.dtype.alignment:
            raw = raw.copy()  # msgpack does not align arrays
        array = raw.view(np.ndarray).view(self.dtype).reshape(self.shape)
        array.flags.writeable = False
        return array

    def to_bytes(self) -> bytes:
        """The bytes as they lie in the file."""
        return b"".join(piece.tobytes() for piece in self.pieces)


def read_safetensors(path: pathlib.Path) -> dict[str, TensorReader]:
    """The tensors of one safetensors file, by name.

    Raises:
      UserError: the file is truncated or corrupt; one message with all that is wrong.
    """
    data = _map(path)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if data.size < 8 or length > min(data.size - 8, _MAX_HEADER):
        raise _damaged(path, data, [f"a header of {length:,} bytes cannot be in it"])
    try:
        header = json.loads(
            data[8 : 8 + length].tobytes().decode("utf-8"), object_pairs_hook=_unique
        )
        entries = {name: header[name] for name in header if name != "__metadata__"}
        spans = {name: _entry(name, entry) for name, entry in entries.items()}
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, data, [f"its header is not a safetensors header ({error})"]) from error
    body = data[8 + length :]
    problems = list(_misplaced(spans, body.size))
    if problems:
        raise _damaged(path, data, problems)
    return {
        name: TensorReader(shape, dtype, (body[start:end],))
        for name, (shape, dtype, start, end) in spans.items()
    }


def read_flax_msgpack(path: pathlib.Path) -> dict[str, TensorReader]:
    """The arrays of a `flax_model.msgpack`, by their path joined with "/".

    Raises:
      UserError: the file is truncated, corrupt, or holds anything else than nested dicts of arrays.
    """
    data = _map(path)
    try:
        walk = _Msgpack(data)
        tree = walk.value()
        if not isinstance(tree, dict):
            raise ValueError("it does not begin with a dictionary")
        if walk.position != data.size:
            raise ValueError(f"{data.size - walk.position:,} bytes follow the end")
        return _flatten(tree)
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, data, [str(error)]) from error


def _map(path: pathlib.Path) -> np.ndarray:
    try:
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _damaged(path: pathlib.Path, data: np.ndarray, problems: list[str]) -> UserError:
    if data[:40].tobytes().startswith(b"version https://git-lfs"):
        return UserError(
            f"{path} is a Git LFS pointer, not the weights. Fetch them with `git lfs pull`."
        )
    return UserError(
        f"{path} ({data.size:,} bytes) is truncated or corrupt: " + "; ".join(problems) + ". "
        "Download or copy it again."
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = sorted({a for a, b in itertools.pairwise(names) if a == b})
        raise ValueError(f"it names twice: {', '.join(twice)}")
    return result


def _entry(name: str, entry: Any) -> tuple[tuple[int, ...], np.dtype, int, int]:
    shape, (start, end), kind = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"shape or offsets of {name} are not numbers ≥ 0")
    if kind not in SAFETENSORS_DTYPES:
        raise ValueError(f"{name} has the unsupported dtype {kind}")
    return tuple(shape), SAFETENSORS_DTYPES[kind], start, end


def _misplaced(spans: dict[str, tuple], size: int) -> Iterable[str]:
    """What is wrong with the places of the tensors: they must tile the `size` bytes of the body."""
    position = 0
    for name, (shape, dtype, start, end) in sorted(spans.items(), key=lambda s: s[1][2:]):
        if end - start != math.prod(shape) * dtype.itemsize:
            yield f"{name} {list(shape)} {dtype} cannot fill {end - start:,} bytes"
        if start < position:
            yield f"{name} overlaps the tensor before it"
        elif start > position:
            yield f"{start - position:,} bytes before {name} belong to no tensor"
        position = max(position, end)
    if position != size:
        yield f"the tensors end at byte {position:,} of {size:,} after the header"


class _Msgpack:
    """Reads msgpack values from mapped bytes; arrays become `TensorReader`s, nothing is copied."""

    def __init__(self, data: np.ndarray):
        self.data = data
        self.position = 0

    def value(self, depth: int = 0) -> Any:
        """The value that begins at `position`, which moves behind it."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
        code = self._number("B")
        if code <= 0x7F or code >= 0xE0:
            return code if code <= 0x7F else code - 0x100
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if code in _NUMBERS:
            return self._number(_NUMBERS[code])
        # A short value keeps its length in the type byte itself.
        short = code & (0x1F if code >= 0xA0 else 0x0F) if code < 0xC0 else 1 << (code - 0xD4) % 8
        size: int = self._number(_SIZES[code]) if code in _SIZES else short
        if code <= 0x8F or code in (0xDE, 0xDF):
            return self._dict(size, depth)
        if code <= 0x9F or code in (0xDC, 0xDD):
            return [self.value(depth + 1) for _ in range(size)]
        if code <= 0xBF or code in (0xD9, 0xDA, 0xDB):
            return self._take(size).tobytes().decode("utf-8")
        if code in (0xC4, 0xC5, 0xC6):
            return self._take(size)
        if code in (0xC7, 0xC8, 0xC9) or 0xD4 <= code <= 0xD8:
            return self._array(size)
        raise ValueError(f"byte {self.position - 1:,} is no msgpack")

    def _take(self, count: int) -> np.ndarray:
        if self.position + count > self.data.size:
            raise ValueError(f"{count:,} bytes at {self.position:,} are not all there")
        self.position += count
        return self.data[self.position - count : self.position]

    def _number(self, kind: str) -> Any:
        return struct.unpack(">" + kind, self._take(struct.calcsize(kind)).tobytes())[0]

    def _dict(self, count: int, depth: int) -> dict[str, Any]:
        pairs = [(self.value(depth + 1), self.value(depth + 1)) for _ in range(count)]
        if not all(isinstance(key, str) for key, _ in pairs):
            raise ValueError("a key is not a string")
        return _unique(pairs)

    def _array(self, size: int) -> TensorReader:
        kind = self._number("b")
        if kind not in _FLAX_ARRAYS:
            raise ValueError(f"a value of the unknown kind {kind}")
        end = self.position + size
        shape, dtype, raw = self.value()
        if self.position != end or not isinstance(raw, np.ndarray):
            raise ValueError(f"the array before byte {end:,} is malformed")
        if dtype not in _FLAX_DTYPES:
            raise ValueError(f"an array has the unsupported dtype {dtype}")
        return _tensor(shape, _FLAX_DTYPES[dtype], (raw,))


def _tensor(shape: list[int], dtype: np.dtype, pieces: tuple[np.ndarray, ...]) -> TensorReader:
    held = sum(piece.size for piece in pieces)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape {shape} of an array is not one")
    if held != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array {shape} {dtype} cannot fill {held:,} bytes")
    return TensorReader(tuple(shape), dtype, pieces)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, TensorReader]:
    flat: dict[str, TensorReader] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and _CHUNKED not in value:
            found = _flatten(value, path + "/")
        elif isinstance(value, dict):
            shape, chunks = _in_order(value["shape"]), _in_order(value["chunks"])
            pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
            if len({chunk.dtype for chunk in chunks}) != 1:
                raise ValueError(f"the chunks of {path} have several dtypes")
            found = {path: _tensor(shape, chunks[0].dtype, pieces)}
        elif isinstance(value, TensorReader):
            found = {path: value}
        else:
            raise ValueError(f"{path} is no array")
        if twice := flat.keys() & found.keys():
            raise ValueError(f"it names twice: {', '.join(sorted(twice))}")
        flat |= found
    return flat


def _in_order(digits: dict[str, Any]) -> list[Any]:
    """Flax stores a tuple as a dictionary of digits."""
    return [digits[str(i)] for i in range(len(digits))]
