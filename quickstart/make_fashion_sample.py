"""Writes the first 500 test images of Fashion-MNIST as a prepared TFDS data set, `fashion_sample`.

Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", 2017, https://arxiv.org/abs/1708.07747,
https://github.com/zalandoresearch/fashion-mnist; licence: MIT. The idx files are those of Debian's
package dataset-fashion-mnist.

Changes: the first 500 of the 10,000 test images, as PNG files; their pixels are untouched.

Run, from the root: apt-get install dataset-fashion-mnist
     pip install -e . && python quickstart/make_fashion_sample.py [FOLDER]
It fills FOLDER/fashion_sample/1.0.0 (default: quickstart/data). The result is committed, so that an
ablation can ask what the quickstart's trunk forgets of the data that it was pretrained on: this
script is not needed to run it.
"""

import itertools
import pathlib
import sys

from tl_jax import idx_files, tfds_writer
from tl_jax.raw_datasets import RawDataset, RawSplit

SOURCE = pathlib.Path("/usr/share/datasets/fashion-mnist")
EXAMPLES = 500
NAMES = (  # by label, as its authors name them
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def main(data_dir: pathlib.Path) -> None:
    """Write the sample below `data_dir`/fashion_sample/1.0.0."""
    whole = idx_files.read_idx(SOURCE)
    test = whole.splits["test"]
    split = RawSplit(
        EXAMPLES,
        test.nbytes * EXAMPLES // test.size,
        lambda: itertools.islice(test.examples(), EXAMPLES),
    )
    sample = RawDataset(NAMES, whole.image_shape, {"test": split}, whole.sha256)
    final = data_dir / "fashion_sample" / "1.0.0"
    tfds_writer.write_once(sample, "fashion_sample", None, final)


if __name__ == "__main__":
    here = pathlib.Path(__file__).resolve().parent
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here / "data")
