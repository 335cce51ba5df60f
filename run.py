"""The command line of tl_jax: `python run.py --config configs/quickstart.py`; see README.md."""

import sys

from tl_jax.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
