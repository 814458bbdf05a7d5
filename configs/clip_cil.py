"""Soft-TF in CLIP on a split CIFAR-100: python launch.py --config=configs/clip_cil.py

The defaults are Table 3's row "CLIP-Prompt-Soft-TF-L[1-12]" on 10-Split-CIFAR100: an image prompt,
text contexts and masks on q,k,v,proj of every layer of the vision tower for each task. Published
are 85.90% (Gradient ID) and 72.28% (Prompt ID), both under the batch_vote protocol, which leaks the
task, and 96.83% with the task given. The paper gives no learning rate; this one is ours.

Variants by argument, any field of soft_jax.config.Config:
  clip_cil.py:mask_layers=3-5
      the row "CLIP-Prompt-Soft-TF-L[3,4,5]"
  clip_cil.py:method=clipprompt
      CLIP-Prompt, without masks
  clip_cil.py:method=clip+pgp
      CLIP-PGP: one image prompt for all tasks, and no task identity
  clip_cil.py:mask_towers=vision+text,text_mask_layers=1-12
      masks in the text tower too
  clip_cil.py:normalization=backbone
      pixels as CLIP was trained on, and not as the host of the published rows has them
"""

from soft_jax.config import config_dict, parse_argument
from soft_jax.paper.rows import CLIP, CLIP_HOST

METHOD = "clipprompt+softtf"
# What would have no effect with a method that has no masks.
MASKS = {"mask_layers": tuple(range(1, 13))}


def get_config(argument=None):
    given = parse_argument(argument)
    paper = {"name": "clip_cil", "method": METHOD, "seed": 42 if given.get("tasks") == 20 else 59}
    has_masks = set(given.get("method", METHOD).split("+")) == set(METHOD.split("+"))
    in_vision = "vision" in given.get("mask_towers", "vision").split("+")
    masks = MASKS if has_masks and in_vision else {}
    return config_dict(**CLIP | CLIP_HOST | paper | masks | given)
