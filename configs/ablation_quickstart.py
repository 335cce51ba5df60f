"""Which freezing strategy, on the quickstart's trunk and digits: 5 strategies × 2 sizes × 2 seeds.

Command   python run.py --mode ablate --config configs/ablation_quickstart.py
Hardware  2 CPU cores; needs nothing from outside
Runtime   4 min 11 s on two cores with AVX2, two runs at once
Expected  test accuracy of 500, mean over seeds 0 and 1, with 10 and 40 examples a class: full 0.777
          and 0.941, top_k 0.858 and 0.923, lp_ft 0.814 and 0.936, linear_probe 0.733 and 0.857,
          random_trunk 0.367 and 0.715
"""

import quickstart


def get_config():
    config = quickstart.get_config()
    config.control = None
    config.data.batch_size = 50
    config.train.epochs = 6
    config.logging.figures = False  # the report has its own
    config.ablate = {
        "axes": (
            (
                "strategy",
                (
                    {"freeze.strategy": "linear_probe"},
                    {"freeze.strategy": "top_k"},
                    {"freeze.strategy": "lp_ft"},
                    {"freeze.strategy": "full"},
                    {"freeze.strategy": "random_trunk"},
                ),
            ),
            ("data.examples_per_class", (10, 40)),
            ("seed", (0, 1)),
        ),
        "learning_rates": (0.03, 0.1, 0.3, 1.0),
        "jobs": 2,
        "measure": {
            "shifts": ("gaussian_noise", "gaussian_blur", "contrast", "translate"),
            "severities": (1, 3),
            "source": "tfds:fashion_sample",
            "source_dir": config.data.dir,
        },
    }
    return config
