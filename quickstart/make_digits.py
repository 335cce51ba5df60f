"""Writes the handwritten digits of the quickstart as a prepared TFDS data set.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49 (the 1,797 test images, 8x8 pixels, values 0..16,
as scikit-learn's `load_digits` carries them). Licence: CC BY 4.0.

Changes: values scaled to 0..255 and rounded; one fixed, stratified division into 1,297 training and
500 test images.

Run: pip install scikit-learn && python quickstart/make_digits.py [FOLDER]
It fills FOLDER/digits/1.0.0 (default: quickstart/data). The result is committed: neither this
script nor scikit-learn is needed to run the quickstart.
"""

import io
import pathlib
import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

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


def png(image: np.ndarray) -> bytes:
    """One grayscale image uint8 [h, w, 1] as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0]).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def main(folder: pathlib.Path) -> None:
    """Write both splits and the metadata below `folder`/digits/1.0.0."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    images, labels = digits()
    target = folder / "digits" / "1.0.0"
    target.mkdir(parents=True, exist_ok=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=target, dataset_name="digits", filetype_suffix="array_record"
    )
    infos = []
    for split, indices in stratified().items():
        path = template.replace(split=split).sharded_filepath(shard_index=0, num_shards=1)
        writer = ArrayRecordWriter(str(path), "group_size:1")
        num_bytes = 0
        for index in indices:
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature["image"].bytes_list.value.append(png(images[index]))
            feature["label"].int64_list.value.append(int(labels[index]))
            record = example.SerializeToString(deterministic=True)
            num_bytes += len(record)
            writer.write(record)
        writer.close()
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(indices)],
                num_bytes=num_bytes,
                filename_template=template.replace(split=split),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=target,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
            }
        ),
        split_infos=infos,
        description="UCI Optical Recognition of Handwritten Digits, 8x8 (CC BY 4.0).",
        homepage="https://doi.org/10.24432/C50P49",
        check_data=False,
    )


if __name__ == "__main__":
    here = pathlib.Path(__file__).parent
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here / "data")
