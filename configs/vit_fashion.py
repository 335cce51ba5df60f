"""ViT-B/16 (ImageNet-21k) → Fashion-MNIST, linear probe.

Command   python run.py --config configs/vit_fashion.py
Hardware  a GPU or TPU, or patience
Runtime   not yet measured with this network
Expected  not yet measured with this network; a ViT-S/14 in its place, trained on 9,000 images at
          224 px: 0.840 to 0.845 on 2,000 test images over 3 seeds; on 5,000 images at 56 px,
          in 6 min of training on two CPU cores: 0.843 (docs/experiments.md)
"""

from tl_jax.config import default_config


def get_config():
    config = default_config()
    config.model.pretrained = "google/vit-base-patch16-224-in21k"
    config.data.source = "tfds:fashion_mnist"
    config.data.splits.train = "train[:90%]"
    config.data.splits.validation = "train[90%:]"
    config.data.splits.test = "test"
    config.data.batch_size = 128
    config.train.epochs = 30
    config.freeze.strategy = "linear_probe"
    # The class token's features differ much in scale: Adam needs a tenth of the steps of sgd.
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "cosine"
    return config
