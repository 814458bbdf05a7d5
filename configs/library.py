"""A library of tasks that grows: soft-jax learn LIBRARY NAME IMAGES

Soft-TF without prompts on the bundled ViT-Ti/8 at 32 pixels: masks on every kernel of the upper
half of the network, below which images pass once for all tasks. Tasks and images are named when
they are learned. A larger backbone by argument, library:backbone=vit_b16.
"""

from soft_jax.config import config_dict, parse_argument
from soft_jax.experiment import settings as settings_lib


def get_config(argument=None):
    settings = {
        "name": "library",
        "dataset": "folder",
        "method": "softtf",
        "backbone": "vit_ti8_32",
        "mask_layers": (7, 8, 9, 10, 11, 12),
        "target_modules": "qkv+proj+mlp",
        "learning_rate": 0.1,
        "epochs": 3,
        "crop_scale": (0.85, 1.0),
        "flip": False,  # of images of unknown kinds, such as letters
        "cache_queries": True,
        "prototype_features": 500,
        "eval_batch_size": 80,
    }
    return config_dict(**settings_lib.beside(parse_argument(argument), settings))
