"""ResNet-50 → cats and dogs (Microsoft's PetImages, 23,262 photographs), linear probe.

Command   python run.py --config configs/resnet_cats_vs_dogs.py
Data      downloaded and prepared on the first start (786 MB); without internet:
          python -m tl_jax.prepare cats_vs_dogs --from FOLDER_OR_ZIP
Hardware  a GPU or TPU, or patience
Runtime   not yet measured
Expected  not yet measured
"""

from tl_jax.config import default_config


def get_config():
    config = default_config()
    config.model.pretrained = "microsoft/resnet-50"
    config.data.source = "tfds:cats_vs_dogs"
    # The data set has one split only.
    config.data.splits.train = "train[:80%]"
    config.data.splits.validation = "train[80%:90%]"
    config.data.splits.test = "train[90%:]"
    config.data.batch_size = 256
    config.data.augmentation = "flip"
    config.train.epochs = 5
    config.freeze.strategy = "linear_probe"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "cosine"
    return config
