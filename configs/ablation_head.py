"""Does a random head distort the trunk? ResNet-50 → Fashion-MNIST, all of it trained.

Command   python run.py --mode ablate --config configs/ablation_head.py
Hardware  two CPU cores do; a GPU
Runtime   14 trainings of 44 s each on two CPU cores with a half-width ResNet-50, two at once
Expected  with that half-width ResNet-50, test accuracy of 2,000 over seeds 0 to 2: 0.742 from
          zeros, 0.725 from a random head; docs/experiments.md reads it

Ten examples a class, 3 seeds: a head drawn at random, and one of zeros, which sends no gradient
into the trunk in the first step.
With TL_JAX_REAL_WEIGHTS set, the half-width ResNet-50 in that folder takes the place of
microsoft/resnet-50. Its BatchNorm was folded, so that statistics stay frozen.
"""

import os

from tl_jax.config import default_config

WEIGHTS = os.environ.get("TL_JAX_REAL_WEIGHTS")


def get_config():
    config = default_config()
    config.model.pretrained = f"{WEIGHTS}/resnet50-thin" if WEIGHTS else "microsoft/resnet-50"
    config.model.image_size = 64
    config.data.source = "tfds:fashion_mnist"
    config.data.splits.train = "train[:50000]"
    config.data.splits.validation = "train[50000:50500]"
    config.data.splits.test = "test[:2000]"
    config.data.examples_per_class = 10
    config.data.batch_size = 50
    config.freeze.strategy = "full"
    config.freeze.batch_norm = "frozen"
    config.train.epochs = 15
    config.optimizer.name = "sgd"
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = "10%"
    config.logging.figures = False  # the report has its own
    config.ablate = {
        "axes": (
            ("head.init", ("zeros", "normal")),
            ("seed", (0, 1, 2)),
        ),
        "learning_rates": (0.002, 0.01, 0.05, 0.25),
        "jobs": 2,
        "measure": {
            "shifts": (
                "gaussian_noise",
                "gaussian_blur",
                "contrast",
                "brightness",
                "pixelate",
                "rotate",
                "translate",
            ),
            "severities": (1, 3, 5),
            "shift_images": 300,
        },
    }
    return config
