"""Preprocessing against transformers' PIL image processors, which need no PyTorch."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest
import transformers

from tl_jax import processor_files
from tl_jax.errors import UserError
from tl_jax.preprocessing import Preprocessing

PROCESSORS = pathlib.Path(__file__).parent / "golden" / "processors"
NAMES = sorted(path.stem for path in PROCESSORS.glob("*.json"))
KINDS = ("Bit", "CLIP", "ConvNext", "DeiT", "ViT")
# transformers rounds after each step of the normalisation: some units in the last place of numbers
# up to 4. One level of 255 is 4e-3 before the normalisation and 1e-2 after it.
TOLERANCE = 2e-6

# Compiled once for equal values and sizes, whichever test asks.
device = jax.jit(Preprocessing.device, static_argnums=0)


def fixture(name: str) -> dict:
    return json.loads((PROCESSORS / f"{name}.json").read_text())


def channels_of(name: str) -> int:
    return 1 if name == "vit-grayscale" else 3


def reference(processor: dict, images: list) -> np.ndarray:
    """What transformers makes of the images: float32 [N, H, W, C]."""
    name = processor.get("image_processor_type") or processor["feature_extractor_type"]
    kind = next(k for k in KINDS if name.startswith(k))
    values = {k: v for k, v in processor.items() if not k.endswith("_type")}
    image_processor = getattr(transformers, f"{kind}ImageProcessorPil")(**values)
    output = image_processor(images, return_tensors="np", input_data_format="channels_last")
    return np.moveaxis(np.stack(output["pixel_values"]), 1, -1)


def noise(height: int, width: int, channels: int = 3, count: int = 1) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    shape = (count, height, width, channels)
    bytes_ = rng.integers(0, 256, shape, dtype=np.uint8)
    # Half the noise is black and white, which makes bicubic overshoot and clip.
    return np.where(rng.random(shape) < 0.5, bytes_, np.where(bytes_ > 127, 255, 0)).astype("u1")


def natural(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Smooth shading, an edge and a flat part; uint8 [1, h, w, c]."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    shades = [127 + 90 * np.sin(5 * x + c) * np.cos(3 * y - c) for c in range(channels)]
    image = np.stack(shades, -1)
    image[(x - 0.5) ** 2 + (y - 0.3) ** 2 < 0.03] = 250
    image[: height // 4, : width // 4] = 3
    return image.astype(np.uint8)[None]


def assert_pixels_equal(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("size", [(28, 28), (300, 257), (61, 120), (120, 61)])
@pytest.mark.parametrize("name", NAMES)
def test_device_matches_transformers_for_every_processor_file(name, size):
    channels = channels_of(name)
    images = np.concatenate([noise(*size, channels), natural(*size, channels)])
    preprocessing = Preprocessing.from_processor(fixture(name), channels)
    got = device(preprocessing, images)
    assert got.shape[1:] == (*preprocessing.output_size, channels)
    assert_pixels_equal(np.asarray(got), reference(fixture(name), list(images)))


@pytest.mark.parametrize("size", [(28, 28), (61, 120), (300, 257)])
@pytest.mark.parametrize("name", NAMES)
def test_host_then_device_matches_transformers(name, size):
    channels = channels_of(name)
    images = np.concatenate([noise(*size, channels), natural(*size, channels)])
    pictures = [PIL.Image.fromarray(i.squeeze(-1) if channels == 1 else i) for i in images]
    preprocessing = Preprocessing.from_processor(fixture(name), channels)
    bytes_ = np.stack([preprocessing.host(picture) for picture in pictures])
    assert bytes_.dtype == np.uint8
    assert bytes_.shape[1:] == (*preprocessing.output_size, channels)
    after = preprocessing.after_host()
    assert after.output_size == preprocessing.output_size
    assert_pixels_equal(np.asarray(device(after, bytes_)), reference(fixture(name), list(images)))


def test_the_hub_files_mean_what_their_authors_meant():
    resnet = Preprocessing.from_processor(fixture("microsoft--resnet-50"), 3)
    assert (resnet.resize, resnet.crop, resnet.resample) == (256, (224, 224), 3)
    assert resnet.rescale_factor == 1 / 255
    vit = Preprocessing.from_processor(fixture("google--vit-base-patch16-224-in21k"), 3)
    assert (vit.resize, vit.crop, vit.resample) == ((224, 224), None, 2)
    assert vit.mean == vit.std == (0.5, 0.5, 0.5)
    warped = Preprocessing.from_processor(fixture("facebook--convnext-base-384"), 3)
    assert (warped.resize, warped.crop) == ((384, 384), None)
    deit = Preprocessing.from_processor(fixture("facebook--deit-tiny"), 3)
    assert (deit.resize, deit.crop) == ((256, 256), (224, 224))


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_left_out_has_the_default_of_transformers(kind):
    processor = {"image_processor_type": f"{kind}ImageProcessor"}
    images = noise(40, 50)
    got = device(Preprocessing.from_processor(processor, 3), images)
    assert_pixels_equal(np.asarray(got), reference(processor, list(images)))
    nulls = {**processor, "size": None, "image_mean": None, "resample": None}
    assert Preprocessing.from_processor(nulls, 3) == Preprocessing.from_processor(processor, 3)


def test_a_file_without_a_type_goes_by_the_model_then_by_its_fields():
    file = {"size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert Preprocessing.from_processor(file, 3).resize == (224, 224)
    assert Preprocessing.from_processor(file, 3, model_type="resnet").resize == 256
    assert Preprocessing.from_processor(file | {"crop_pct": 0.5}, 3).resize == 448
    assert Preprocessing.from_processor(file | {"crop_size": 96}, 3).crop == (96, 96)


@pytest.mark.parametrize("crop", [(64, 64), (65, 47), (33, 80), (90, 34)])
def test_a_crop_larger_than_the_image_is_padded_with_zeros(crop):
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": False,
        "crop_size": {"height": crop[0], "width": crop[1]},
    }
    preprocessing = Preprocessing.from_processor(processor, 3)
    images = np.maximum(noise(40, 51), 1)
    expected = reference(processor, list(images))
    assert_pixels_equal(np.asarray(device(preprocessing, images)), expected)
    host = preprocessing.host(PIL.Image.fromarray(images[0]))[None]
    assert_pixels_equal(np.asarray(device(preprocessing.after_host(), host)), expected)


@pytest.mark.parametrize("name", ["microsoft--resnet-50", "facebook--dinov2-small"])
def test_image_size_goes_straight_to_a_square(name):
    preprocessing = Preprocessing.from_processor(fixture(name), 3, image_size=64)
    images = noise(48, 80)
    got = np.asarray(device(preprocessing, images))
    resized = PIL.Image.fromarray(images[0]).resize((64, 64), resample=3)
    mean, std = np.float32(fixture(name)["image_mean"]), np.float32(fixture(name)["image_std"])
    expected = (np.float32(np.asarray(resized) / 255) - mean) / std
    assert_pixels_equal(got, expected[None])


def test_grayscale_is_repeated_and_rgb_becomes_pillows_l():
    gray, rgb = noise(28, 28, 1), noise(28, 28, 3)
    three = Preprocessing.from_processor(fixture("microsoft--resnet-50"), 3)
    np.testing.assert_array_equal(device(three, gray), device(three, gray.repeat(3, -1)))
    one = Preprocessing.from_processor(fixture("vit-grayscale"), 1)
    luma = np.asarray(PIL.Image.fromarray(rgb[0]).convert("L"))[None, ..., None]
    np.testing.assert_array_equal(device(one, rgb), device(one, luma))
    np.testing.assert_array_equal(
        one.host(PIL.Image.fromarray(rgb[0])), one.host(PIL.Image.fromarray(luma[0, ..., 0]))
    )


def test_every_program_gives_the_same_bits():
    preprocessing = Preprocessing.from_processor(fixture("microsoft--resnet-50"), 3, 40)
    images = noise(40, 40, 3, count=3)
    whole = np.asarray(device(preprocessing, images))
    np.testing.assert_array_equal(device(preprocessing, images[1:2])[0], whole[1])
    np.testing.assert_array_equal(preprocessing.device(images), whole)
    bigger = jax.jit(lambda x: preprocessing.device(x[:, ::-1])[:, ::-1] * 2.0)
    np.testing.assert_array_equal(bigger(images), whole * 2.0)


@pytest.mark.parametrize("resample", range(6))
def test_host_and_device_give_the_same_bytes(resample):
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 33, "width": 70},
        "resample": resample,
        "do_rescale": False,
        "do_normalize": False,
    }
    preprocessing = Preprocessing.from_processor(processor, 3)
    image = noise(50, 41)
    got = np.asarray(device(preprocessing, image))
    np.testing.assert_array_equal(got[0], preprocessing.host(PIL.Image.fromarray(image[0])))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_host_converts_every_mode_as_transformers_does(mode):
    rgba = PIL.Image.fromarray(noise(40, 30, 4)[0], "RGBA")
    if mode == "I;16":
        image = PIL.Image.fromarray(noise(40, 30, 1)[0, ..., 0].astype(np.uint16) * 257)
    else:
        image = rgba.convert(mode) if mode in ("LA", "RGBA") else rgba.convert("RGB").convert(mode)
    assert image.mode == mode
    processor = fixture("facebook--dinov2-small")
    preprocessing = Preprocessing.from_processor(processor, 3)
    got = device(preprocessing.after_host(), preprocessing.host(image)[None])
    assert_pixels_equal(np.asarray(got), reference(processor, [image]))


def test_a_transparent_palette_is_laid_on_white():
    image = PIL.Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30])
    image.info["transparency"] = 0
    preprocessing = Preprocessing.from_processor(fixture("facebook--dinov2-small"), 3)
    assert (preprocessing.host(image) == 255).all()
    one = Preprocessing.from_processor(fixture("vit-grayscale"), 1)
    assert (one.host(image) == 255).all()


ROUND_TRIPS = [(name, size) for name in NAMES for size in (None, 48)]


@pytest.mark.parametrize(("name", "image_size"), ROUND_TRIPS)
def test_to_processor_round_trip(name, image_size):
    channels = channels_of(name)
    preprocessing = Preprocessing.from_processor(fixture(name), channels, image_size)
    written = json.loads(json.dumps(preprocessing.to_processor()))
    assert Preprocessing.from_processor(written, channels) == preprocessing
    images = noise(61, 41, channels)
    got = np.asarray(device(preprocessing, images))
    assert_pixels_equal(got, reference(written, list(images)))
    if image_size is None:
        return
    gray = noise(40, 40, 1)
    expected = reference(written, list(gray))
    assert_pixels_equal(np.asarray(device(preprocessing, gray)), expected)


def test_steps_that_are_off_round_trip():
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": False,
        "do_rescale": False,
        "do_normalize": False,
        "crop_size": 20,
    }
    preprocessing = Preprocessing.from_processor(processor, 3)
    assert Preprocessing.from_processor(preprocessing.to_processor(), 3) == preprocessing
    images = noise(28, 28)
    np.testing.assert_array_equal(device(preprocessing, images), images[:, 4:24, 4:24])
    assert hash(preprocessing) == hash(dataclasses.replace(preprocessing))


BAD = {
    "size": [0, -1, True, "224", [224], [224, 224, 3], 10**30, 4097, 224.5],
    "size ": [{"height": 9}, {"shortest_edge": 0}, {"longest_edge": 9}, {"height": 2, "depth": 2}],
    "crop_size": [0, "big", {"shortest_edge": 224}, {"height": 224, "width": None}],
    "resample": [6, -1, "bicubic", True, 2.0, [3]],
    "do_resize": ["yes", 1],
    "do_rescale": ["false"],
    "do_normalize": [0],
    "do_center_crop": ["no"],
    "do_pad": [True],
    "rescale_factor": [0, float("nan"), float("inf"), "1/255", -1, 10**400],
    "image_mean": [[0.5], [0.5] * 4, "0.5", [0.5, 0.5, None], [float("nan")] * 3, {}],
    "image_std": [0, [0.2, 0, 0.2], -1, [0.2, 0.2], [True] * 3, [float("inf")] * 3],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values])
def test_a_value_that_makes_no_sense_is_named(field, value):
    field = field.strip()
    processor = fixture("facebook--dinov2-small") | {field: value}
    with pytest.raises(UserError, match=rf"preprocessor_config.json.*\n  {field} is "):
        Preprocessing.from_processor(processor, 3)


@pytest.mark.parametrize("value", [0, -1, 1.5, "x", 1e-9, float("nan")])
def test_a_crop_share_that_makes_no_sense_is_named(value):
    processor = fixture("microsoft--resnet-50") | {"crop_pct": value}
    with pytest.raises(UserError, match="crop_pct is"):
        Preprocessing.from_processor(processor, 3)
    with pytest.raises(UserError, match="more than 4096 pixels"):
        Preprocessing.from_processor(processor | {"crop_pct": 0.02}, 3)


def test_all_bad_values_are_named_at_once():
    processor = {
        "image_processor_type": "BitImageProcessor",
        **{field: values[0] for field, values in BAD.items() if not field.startswith("do_")},
    }
    with pytest.raises(UserError) as error:
        Preprocessing.from_processor(processor, 3)
    for field in ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std"):
        assert f"{field} is " in str(error.value)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"image_processor_type": "SamImageProcessor"}, "supported are BitImageProcessor"),
        ({"feature_extractor_type": 3}, "not supported"),
        ([], "JSON object"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": [9, 9]}, "shortest_edge"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": 9, "do_center_crop": True},
            "do_center_crop",
        ),
        ({"image_processor_type": "BitImageProcessor", "do_center_crop": False}, "image_size"),
        ({"image_processor_type": "ViTImageProcessor", "do_resize": False}, "image_size"),
        ({"image_processor_type": "ViTImageProcessor", "do_center_crop": True}, "crop_size"),
    ],
)
def test_what_cannot_be_done_is_said(processor, message):
    with pytest.raises(UserError, match=message):
        Preprocessing.from_processor(processor, 3)


@pytest.mark.parametrize("image_size", [0, -3, 5000, True])
def test_image_size_must_make_sense(image_size):
    with pytest.raises(UserError, match="image_size"):
        Preprocessing.from_processor(fixture("microsoft--resnet-50"), 3, image_size)


def test_image_size_mends_a_file_without_a_crop():
    processor = {"image_processor_type": "BitImageProcessor", "do_center_crop": False}
    assert Preprocessing.from_processor(processor, 3, 32).output_size == (32, 32)


def test_three_means_do_not_fit_a_grayscale_network():
    with pytest.raises(UserError, match=r"image_mean is .*1 channels.*\n.*image_std"):
        Preprocessing.from_processor(fixture("microsoft--resnet-50"), 1)


def test_images_that_do_not_fit_are_refused():
    preprocessing = Preprocessing.from_processor(fixture("microsoft--resnet-50"), 3)
    with pytest.raises(UserError, match="4 channels"):
        device(preprocessing, noise(8, 8, 4))
    with pytest.raises(UserError, match="float32"):
        device(preprocessing, noise(8, 8).astype(np.float32))
    with pytest.raises(UserError, match="1 x 9999"):
        preprocessing.host(PIL.Image.new("L", (9999, 1)))


def test_defaults_are_those_of_the_installed_transformers():
    for kind, ours in processor_files._DEFAULTS.items():
        theirs = getattr(transformers, f"{kind}ImageProcessorPil")()
        for name, value in {**processor_files._COMMON, **ours}.items():
            expected = getattr(theirs, name)
            if name in ("do_center_crop", "do_pad", "do_convert_rgb") and expected is None:
                continue
            if name in ("size", "crop_size"):
                value, expected = dict(value), dict(expected)
            assert value == expected or list(value) == list(expected), (kind, name)
