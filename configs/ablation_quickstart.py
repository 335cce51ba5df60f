"""Which freezing strategy, on the quickstart's trunk and digits: 6 strategies × 2 sizes × 2 seeds.

Command   python run.py --mode ablate --config configs/ablation_quickstart.py
Hardware  2 CPU cores; needs nothing from outside
Runtime   2.2 min, two runs at once
Expected  test accuracy of 500, mean over seeds 0 and 1, with 10 and 80 examples a class: full 0.879
          and 0.962, top_k 0.877 and 0.967, lp_ft 0.868 and 0.970, linear_probe 0.789 and 0.909,
          from_scratch 0.762 and 0.979, random_trunk 0.603 and 0.851
"""

import quickstart


def get_config():
    config = quickstart.get_config()
    config.control = None
    config.data.batch_size = 50
    config.train.epochs = 10
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
                    {"freeze.strategy": "from_scratch"},
                ),
            ),
            ("data.examples_per_class", (10, 80)),
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
