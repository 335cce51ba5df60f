"""Small data sets for tests: the quickstart's digits, and folders of generated images."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from tl_jax.datasets import open_dataset
from tl_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS_DIR = str(ROOT / "quickstart" / "data")
DIGITS_SPLITS = {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"}


def noise(seed: int, height: int = 8, width: int = 8, mode: str = "RGB") -> Image.Image:
    """An image that is different for each seed."""
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, shape, np.uint8))


def write_folder(
    root: pathlib.Path, counts: dict[str, int], suffix: str = ".png", many_sizes: bool = False
) -> pathlib.Path:
    """One sub-folder per class with `counts[class]` images in it."""
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            width = 8 + seed % 5 if many_sizes else 8
            noise(seed, width=width).save(root / name / f"{number:03}{suffix}")
            seed += 1
    return root


def fails(source, splits, *words, data_dir=None, **options):
    """The message with which opening fails; it holds all the words."""
    with pytest.raises(UserError) as caught:
        open_dataset(source, splits, data_dir, **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return str(caught.value)
