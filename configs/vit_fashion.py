"""ViT-B/16 (ImageNet-21k) → Fashion-MNIST, linear probe."""

from tl_jax.config import default_config


def get_config():
    config = default_config()
    config.model.pretrained = "google/vit-base-patch16-224-in21k"
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
