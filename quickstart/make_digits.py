"""Writes the handwritten digits of the quickstart as a prepared TFDS data set.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49 (the 1,797 test images, 8x8 pixels, values 0..16,
as scikit-learn's `load_digits` carries them). Licence: CC BY 4.0.

Changes: values scaled to 0..255 and rounded; one fixed, stratified division into 1,297 training and
500 test images.

Run, from the root: pip install -e . scikit-learn && python quickstart/make_digits.py [FOLDER]
It fills FOLDER/digits/1.0.0 (default: quickstart/data). The result is committed: neither this
script nor scikit-learn is needed to run the quickstart.
"""

import pathlib
import sys
import tempfile

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from tl_jax.prepare import prepare

TEST_EXAMPLES = 500
SEED = 0


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [1797, 8, 8, 1] and labels int64 [1797]."""
    data = load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)
    return images[..., None], data.target


def stratified() -> dict[str, np.ndarray]:
    """Indices of each split: a fixed permutation in which the classes keep their shares."""
    labels = digits()[1]
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_EXAMPLES, random_state=SEED, stratify=labels
    )
    return {"train": train, "test": test}


def main(data_dir: pathlib.Path) -> None:
    """Write both splits below `data_dir`/digits/1.0.0, by way of a folder of images."""
    images, labels = digits()
    with tempfile.TemporaryDirectory() as folder:
        for split, indices in stratified().items():
            for index in indices:
                path = pathlib.Path(folder, split, str(labels[index]), f"{index:04}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[index, :, :, 0]).save(path, optimize=True)
        prepare("digits", folder, str(data_dir))


if __name__ == "__main__":
    here = pathlib.Path(__file__).resolve().parent
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here / "data")
