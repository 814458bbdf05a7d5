"""The embedded default: handwritten digits (scikit-learn's, 5 tasks of 2 classes) on the bundled
ViT-Ti/8 at 32 pixels.

`python launch.py` runs it in under 2 minutes on two cores, with nothing to download. It stands for
no published row. Digits are not flipped, and their crops keep most of the image.
"""

from soft_jax.config import config_dict, parse_argument


def get_config(argument=None):
    digits = {
        "name": "digits",
        "dataset": "digits",
        "tasks": 5,
        "backbone": "vit_ti8_32",
        "epochs": 5,
        "crop_scale": (0.6, 1.0),
        "flip": False,
    }
    return config_dict(**digits | parse_argument(argument))
