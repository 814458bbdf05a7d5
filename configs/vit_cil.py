"""Soft-TF on a split CIFAR-100: python launch.py --config=configs/vit_cil.py

The defaults are Table 7's row "DualPrompt-Soft-TF-L[10,11,12] q,k,v,proj" on 10-Split-CIFAR100,
published as 98.05% (Gradient ID of a whole test batch, a row with shots=0; 97.76% of 7 images) and
92.35% (Prompt ID), all under the batch_vote protocol, which leaks the task.

Variants by argument, any field of soft_jax.config.Config or `layers` for the E-prompt and masked
layers together:
  vit_cil.py:tasks=20
      20-Split-CIFAR100 (seed 42)
  vit_cil.py:method=dualprompt
      DualPrompt with E-prompts in the same layers
  vit_cil.py:backbone=vit_ti8_32,target_modules=qkv+proj+mlp,epochs=2
      the small bundled backbone at 32 pixels
"""

from soft_jax.config import config_dict, parse_argument


def get_config(argument=None):
    settings = parse_argument(argument)
    paper = {"name": "vit_cil", "seed": 42 if settings.get("tasks") == 20 else 59}
    return config_dict(**paper | settings)
