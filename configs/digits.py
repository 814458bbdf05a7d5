"""The embedded default: handwritten digits (scikit-learn's, 5 tasks of 2 classes) on the bundled
ViT-Ti/8 at 32 pixels.

`python launch.py` runs it in under 2 minutes of CPU time, with nothing to download. It stands for
no published row: masks are on every kernel of the upper half of the network, so that a few epochs
show what they do, and what a small run pays most for is set lower than in the paper. Settings were
chosen on images held out of training (`validation=0.25`), never on test images.
"""

from soft_jax.config import config_dict, parse_argument


def get_config(argument=None):
    digits = {
        "name": "digits",
        "dataset": "digits",
        "tasks": 5,
        "backbone": "vit_ti8_32",
        "mask_layers": (7, 8, 9, 10, 11, 12),
        "target_modules": "qkv+proj+mlp",
        "g_prompt_layers": (7,),  # so that nothing below it is trained
        "epochs": 3,
        "learning_rate": 0.1,
        # Digits are not flipped, and their crops keep most of the image.
        "crop_scale": (0.85, 1.0),
        "flip": False,
        "cache_queries": True,  # the query of each crop is a third of a training step
        "prototype_features": 500,  # for some 1,400 training images
        "eval_batch_size": 64,  # near a task's test images: fewer sizes are compiled
    }
    return config_dict(**digits | parse_argument(argument))
