"""ResNet-50 → Fashion-MNIST, linear probe.

Command   python run.py --config configs/resnet_fashion.py
Hardware  any; a GPU for comfort at the checkpoint's own 224 px
"""

from tl_jax.config import default_config


def get_config():
    config = default_config()
    config.model.pretrained = "microsoft/resnet-50"
    config.data.source = "tfds:fashion_mnist"
    config.data.splits.train = "train[:90%]"
    config.data.splits.validation = "train[90%:]"
    config.data.splits.test = "test"
    config.data.batch_size = 256
    config.train.epochs = 10
    config.freeze.strategy = "linear_probe"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "cosine"
    return config
