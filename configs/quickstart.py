"""The quickstart: a small ResNet pretrained on Fashion-MNIST → handwritten digits, linear probe.

Command   python run.py --config configs/quickstart.py
Hardware  2 CPU cores; needs nothing from outside
"""

from pathlib import Path

from tl_jax.config import default_config

QUICKSTART = Path(__file__).resolve().parent.parent / "quickstart"


def get_config():
    config = default_config()
    config.model.pretrained = str(QUICKSTART / "trunk")
    config.data.source = "tfds:digits"
    config.data.dir = str(QUICKSTART / "data")
    config.data.splits.train = "train[:1000]"
    config.data.splits.validation = "train[1000:]"
    config.data.splits.test = "test"
    config.data.batch_size = 64
    config.train.epochs = 30
    config.freeze.strategy = "linear_probe"
    config.control = "random_trunk"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.01
    config.optimizer.schedule = "cosine"
    return config
