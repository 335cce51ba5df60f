"""ViT-B/16 (ImageNet-21k) → a folder of your own images, the last two layers train.

Command   python run.py --config configs/vit_folder.py --config.data.source=folder:/path/to/images
Data      one sub-folder a class (/path/to/images/cat/1.jpg …); images of any size
Hardware  a GPU or TPU, or patience
Runtime   not yet measured
Expected  not yet measured
"""

from tl_jax.config import default_config


def get_config():
    config = default_config()
    config.model.pretrained = "google/vit-base-patch16-224-in21k"
    config.data.source = "folder:images"
    # A folder that has train/, validation/ and test/ inside: name these instead.
    config.data.splits.train = "train[:80%]"
    config.data.splits.validation = "train[80%:90%]"
    config.data.splits.test = "train[90%:]"
    config.data.batch_size = 64
    config.data.augmentation = "random_resized_crop"
    config.train.epochs = 10
    config.train.gradient_clip_norm = 1.0
    config.freeze.strategy = "top_k"
    config.freeze.k = 2
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = "5%"
    return config
