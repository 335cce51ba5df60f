"""A small ResNet on Fashion-MNIST, from random weights: the trunk of the quickstart.

Command   python quickstart/pretrain.py --data-dir DIR (see there; it starts this configuration)
Hardware  2 CPU cores
Runtime   9 min, on 2 cores that were shared with other work (8 min of it training)
Expected  test accuracy 0.913 (one run; 95 % interval 0.908 to 0.919)
"""

from pathlib import Path

from tl_jax.config import default_config

TRUNK = Path(__file__).resolve().parent.parent / "quickstart" / "trunk"


def get_config():
    config = default_config()
    # From scratch, this folder only says what the network looks like.
    config.model.pretrained = str(TRUNK)
    config.data.source = "tfds:fashion_mnist"
    config.data.splits.train = "train[:55000]"
    config.data.splits.validation = "train[55000:]"
    config.data.splits.test = "test"
    config.data.batch_size = 128
    config.data.augmentation = "none"
    config.train.epochs = 4
    config.train.gradient_clip_norm = 0.0  # as the trunk in quickstart/trunk was made
    config.freeze.strategy = "from_scratch"
    config.freeze.batch_norm = "batch"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = "5%"
    return config
