"""Train and evaluate a continual learner: python launch.py --config=configs/vit_cil.py"""

import sys

from soft_jax.__main__ import console

if __name__ == "__main__":
    console(["train", *sys.argv[1:]])
