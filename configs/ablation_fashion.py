"""Which freezing strategy, ResNet-50 → Fashion-MNIST: 8 strategies × 2 sizes × 3 seeds.

Command   python run.py --mode ablate --config configs/ablation_fashion.py
Hardware  two CPU cores do; a GPU
Runtime   30 to 90 min on two CPU cores with a half-width ResNet-50, two runs at once
Expected  with that half-width ResNet-50, test accuracy of 2,000 over seeds 0 to 2: full 0.742
          with 10 and 0.856 with 100 examples a class, linear_probe 0.670 and 0.785,
          random_trunk 0.477 and 0.649; the whole report is in docs/examples/ablation_fashion

With TL_JAX_REAL_WEIGHTS set, the half-width ResNet-50 in that folder takes the place of
microsoft/resnet-50. Its BatchNorm was folded, so that statistics stay frozen.
"""

import os

from tl_jax.config import default_config

WEIGHTS = os.environ.get("TL_JAX_REAL_WEIGHTS")
STRATEGIES = (
    "linear_probe",
    "top_k",
    "surgical",
    "bitfit",
    "lp_ft",
    "full",
    "random_trunk",
    "from_scratch",
)


def get_config():
    config = default_config()
    config.model.pretrained = f"{WEIGHTS}/resnet50-thin" if WEIGHTS else "microsoft/resnet-50"
    config.model.image_size = 64
    config.data.source = "tfds:fashion_mnist"
    config.data.splits.train = "train[:50000]"
    config.data.splits.validation = "train[50000:50500]"
    config.data.splits.test = "test[:2000]"
    config.data.batch_size = 50
    config.freeze.batch_norm = "frozen"
    config.optimizer.name = "sgd"
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = "10%"
    config.logging.figures = False  # the report has its own
    config.ablate = {
        "axes": (
            ("freeze.strategy", STRATEGIES),
            (
                "data.examples_per_class",
                (
                    {"name": "10", "data.examples_per_class": 10, "train.epochs": 15},
                    {"name": "100", "data.examples_per_class": 100, "train.epochs": 6},
                ),
            ),
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
