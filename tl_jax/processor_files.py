"""The content of a `preprocessor_config.json` to plain values and back.

Reads today's files and the older ones that the Hub still serves (`feature_extractor_type`, an
integer `size`, `crop_pct`, fields left out). The files are not trusted: every value is checked.
"""

import re
from typing import Any

from tl_jax import resampling
from tl_jax.errors import UserError

MAX_EDGE = 4096

_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_HALF = [0.5, 0.5, 0.5]

_COMMON = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": _HALF,
    "image_std": _HALF,
    "do_center_crop": False,
    "do_pad": False,
    "do_convert_rgb": True,
    "default_to_square": True,
}
_CROP_224 = {
    "resample": resampling.BICUBIC,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
# Class attributes of transformers' image processors; a field that a file leaves out has these.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Bit": _CROP_224,
    "CLIP": _CROP_224,
    "ConvNext": {
        "resample": resampling.BICUBIC,
        "size": {"shortest_edge": 384},
        "default_to_square": False,
        "crop_pct": 224 / 256,
    },
    "DeiT": {
        "resample": resampling.BICUBIC,
        "size": {"height": 256, "width": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    },
    "ViT": {"resample": resampling.BILINEAR, "size": {"height": 224, "width": 224}},
}
_TYPE = re.compile(rf"({'|'.join(_DEFAULTS)})(FeatureExtractor|ImageProcessor)(Fast|Pil)?")
# ConvNeXT's processor warps instead of cropping from this size on.
_CONVNEXT_WARP = 384
_SHORTEST = ("shortest_edge",)


class _Fields:
    """Values of the file over defaults; what makes no sense is noted in `problems`."""

    def __init__(self, given: dict[str, Any], defaults: dict[str, Any]):
        # As in transformers, null means that the default holds.
        self.values = {**_COMMON, **defaults}
        self.values.update({key: value for key, value in given.items() if value is not None})
        self.problems: list[str] = []

    def wrong(self, name: str, needed: str) -> None:
        value = repr(self.values.get(name))
        value = value if len(value) <= 60 else value[:57] + "..."
        self.problems.append(f"{name} is {value}: {needed}")

    def flag(self, name: str) -> bool:
        if not isinstance(self.values[name], bool):
            self.wrong(name, "must be true or false")
        return self.values[name] is True

    def number(self, name: str, low: float, high: float) -> float:
        value = self.values[name]
        if not _is_number(value, low, high):
            self.wrong(name, f"must be a number from {low:g} to {high:g}")
            return high
        return float(value)

    def per_channel(self, name: str, channels: int, low: float) -> tuple[float, ...]:
        value = self.values[name]
        many = value if isinstance(value, list | tuple) else [value] * channels
        if len(many) != channels or not all(_is_number(v, low, 1e6) for v in many):
            numbers = "a number" if channels == 1 else f"a number or {channels} numbers"
            self.wrong(name, f"must be {numbers} from {low:g} to 1e+06 ({channels} channels)")
            return (1.0,) * channels
        return tuple(float(v) for v in many)

    def filter(self) -> int:
        value = self.values["resample"]
        known = range(len(resampling.NAMES))
        if isinstance(value, bool) or not isinstance(value, int) or value not in known:
            names = ", ".join(f"{i} {name}" for i, name in enumerate(resampling.NAMES))
            self.wrong("resample", f"must be one of {names}")
            return resampling.BILINEAR
        return value

    def size(self, name: str, square: bool) -> tuple[int, int] | int | None:
        """(height, width), or an int for the shorter edge; None if it makes no sense."""
        value = self.values.get(name)
        if isinstance(value, dict):
            value = {key: edge for key, edge in value.items() if edge is not None}
            keys = ("height", "width") if name == "crop_size" or "height" in value else _SHORTEST
            edges = [value[key] for key in keys] if set(value) == set(keys) else []
        elif isinstance(value, list | tuple):
            edges = list(value) if len(value) == 2 else []
        else:
            edges = [value, value] if square else [value]
        if not edges or not all(isinstance(e, int) and _is_number(e, 1, MAX_EDGE) for e in edges):
            forms = "an integer or {height, width}"
            forms = forms if name == "crop_size" else f"{forms} or {{shortest_edge}}"
            self.wrong(name, f"must be {forms}, of 1 to {MAX_EDGE} pixels")
            return None
        return (edges[0], edges[1]) if len(edges) == 2 else edges[0]


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def read(
    processor: dict[str, Any], channels: int, image_size: int | None, model_type: str | None
) -> dict[str, Any]:
    """The fields of `tl_jax.preprocessing.Preprocessing`; see its `from_processor`."""
    if not isinstance(processor, dict):
        raise UserError("preprocessor_config.json: must hold a JSON object")
    kind = _kind(processor, model_type)
    fields = _Fields(processor, _DEFAULTS[kind])
    resize, crop = _geometry(fields, kind, image_size)
    resample = fields.filter()
    fields.flag("do_convert_rgb")
    rescale = fields.flag("do_rescale")
    factor = fields.number("rescale_factor", 1e-12, 1e6) if rescale else None
    mean = std = None
    if fields.flag("do_normalize"):
        mean = fields.per_channel("image_mean", channels, -1e6)
        std = fields.per_channel("image_std", channels, 1e-6)
    if fields.problems:
        raise UserError(
            f"preprocessor_config.json ({kind} image processor) holds values that cannot be used; "
            "correct the file:\n  " + "\n  ".join(fields.problems)
        )
    return {
        "channels": channels,
        "resize": resize,
        "crop": crop,
        "resample": resample,
        "rescale_factor": factor,
        "mean": mean,
        "std": std,
    }


def _kind(processor: dict[str, Any], model_type: str | None) -> str:
    name = processor.get("image_processor_type") or processor.get("feature_extractor_type")
    if name is None:
        # Old files without a type: transformers goes by the model, else the fields tell.
        if model_type in ("resnet", "vit"):
            return {"resnet": "ConvNext", "vit": "ViT"}[model_type]
        if "crop_pct" in processor:
            return "ConvNext"
        return "Bit" if "crop_size" in processor or "do_center_crop" in processor else "ViT"
    match = _TYPE.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise UserError(
            f"preprocessor_config.json: the image processor {str(name)[:60]!r} is not supported; "
            f"supported are {', '.join(f'{kind}ImageProcessor' for kind in _DEFAULTS)}"
        )
    return match[1]


def _geometry(
    fields: _Fields, kind: str, image_size: int | None
) -> tuple[tuple[int, int] | int | None, tuple[int, int] | None]:
    """What to resize to and what to crop to."""
    resize: tuple[int, int] | int | None = None
    crop: tuple[int, int] | None = None
    square = fields.flag("default_to_square")
    cropping = fields.flag("do_center_crop")
    if fields.flag("do_resize"):
        resize = fields.size("size", square)
        if kind == "ConvNext":
            resize, crop = _convnext(fields, resize, cropping)
    if cropping and crop is None:
        size = fields.size("crop_size", square=True)
        crop = size if isinstance(size, tuple) else None
    if fields.flag("do_pad"):
        fields.wrong("do_pad", "padding is not supported")
    if image_size is not None:
        if not isinstance(image_size, int) or not _is_number(image_size, 1, MAX_EDGE):
            raise UserError(f"image_size is {image_size}: must be 1 to {MAX_EDGE} pixels")
        return (image_size, image_size), None
    if crop is None and not isinstance(resize, tuple) and not fields.problems:
        fields.wrong(
            "do_center_crop",
            "without a crop these values give images of many sizes; set config.model.image_size",
        )
    return resize, crop


def _convnext(
    fields: _Fields, size: tuple[int, int] | int | None, cropping: bool
) -> tuple[tuple[int, int] | int | None, tuple[int, int] | None]:
    """Below 384 pixels: resize the shorter edge to size / crop_pct, crop to size; else warp."""
    share = fields.number("crop_pct", 0.01, 1.0)
    if isinstance(size, tuple):
        fields.wrong("size", "a ConvNext processor needs an integer or {shortest_edge}")
    if not isinstance(size, int):
        return None, None
    if size >= _CONVNEXT_WARP:
        return (size, size), None
    if cropping:
        fields.wrong("do_center_crop", "a ConvNext processor already crops by crop_pct")
    if int(size / share) > MAX_EDGE:
        fields.wrong("crop_pct", f"resizes to more than {MAX_EDGE} pixels")
    return int(size / share), (size, size)


def write(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `read`: every field is named, so that no class's default matters."""
    resize, crop = values["resize"], values["crop"]
    processor: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor" if crop is None else "BitImageProcessor",
        "do_convert_rgb": values["channels"] == 3,
        "do_resize": resize is not None,
        "resample": values["resample"],
        "do_center_crop": crop is not None,
        "do_rescale": values["rescale_factor"] is not None,
        "do_normalize": values["mean"] is not None,
    }
    if isinstance(resize, int):
        processor["size"] = {"shortest_edge": resize}
    elif resize is not None:
        processor["size"] = {"height": resize[0], "width": resize[1]}
    if crop is not None:
        processor["crop_size"] = {"height": crop[0], "width": crop[1]}
    if values["rescale_factor"] is not None:
        processor["rescale_factor"] = values["rescale_factor"]
    if values["mean"] is not None:
        processor["image_mean"] = list(values["mean"])
        processor["image_std"] = list(values["std"])
    return processor
