"""Steps of the published PyTorch code, for `benchmarks.training`: runs in an interpreter that
has its requirements, beside its checkout.

python published.py CHECKOUT SIZE BATCH DEVICE, then a number of steps a line on standard input;
answers with seconds a line. The steps are `engine.train_one_epoch` as it stands, on random images
that are on the device already: no loading, no augmentation. What it needs and does not have to be
there for a timing (wandb, a GPU to wait for) is replaced by nothing.
"""

import argparse
import contextlib
import io
import json
import sys
import time
import types

CLASSES, TASKS = 100, 10
SIZES = {
    "vit_b16": {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_ti8_32": {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 12, "num_heads": 3},
}


def main() -> None:
    """Answer requests until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("batch", type=int)
    parser.add_argument("device")
    parser.add_argument("--autocast", action="store_true", help="the same under bfloat16 autocast")
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.checkout)
    sys.modules["wandb"] = types.SimpleNamespace(log=lambda *_: None)
    import torch

    if arguments.device == "cpu":
        torch.cuda.synchronize = lambda: None
    with contextlib.redirect_stdout(io.StringIO()):  # of prints about every parameter
        steps = _steps(torch, arguments)
    parameters = steps.model.parameters()
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "trained": sum(p.numel() for p in parameters if p.requires_grad),
            }
        ),
        flush=True,
    )
    for line in sys.stdin:
        with contextlib.redirect_stdout(io.StringIO()):
            start = time.perf_counter()
            steps(int(line))
            seconds = time.perf_counter() - start
        print(seconds, flush=True)


def _steps(torch, arguments):
    from engine import train_one_epoch
    from vision_transformer import VisionTransformer

    # As configs/cifar100_10_dualprompt_pgp.py and --subnet soft set it, for L[10,11,12].
    layers, size = [9, 10, 11], SIZES[arguments.size]
    prompts = {
        "prompt_length": 5,
        "prompt_pool": True,
        "prompt_key": True,
        "pool_size": TASKS,
        "top_k": 1,
        "batchwise_prompt": True,
    }
    prompts |= {
        "use_prompt_mask": True,
        "use_g_prompt": True,
        "g_prompt_length": 5,
        "g_prompt_layer_idx": [0, 1],
    }
    prompts |= {
        "use_prefix_tune_for_g_prompt": True,
        "use_e_prompt": True,
        "e_prompt_layer_idx": layers,
    }
    prompts |= {
        "use_prefix_tune_for_e_prompt": True,
        "target_layers": layers,
        "subnet": "soft",
        "param_ratio": 4,
    }
    torch.manual_seed(0)
    original = VisionTransformer(**size, num_classes=CLASSES, target_layers=layers).to(
        arguments.device
    )
    model = VisionTransformer(**size, num_classes=CLASSES, **prompts).to(arguments.device)
    for parameter in original.parameters():
        parameter.requires_grad = False
    frozen = ("blocks", "patch_embed", "cls_token", "norm", "pos_embed")
    for name, parameter in model.named_parameters():
        masks = name.startswith("blocks") and any(
            part in name for part in ("ones_weight", "zeros_weight", "w_m")
        )
        parameter.requires_grad = masks or not name.startswith(frozen)
        if name.endswith(("ones_bias", "b_m")):
            parameter.data.fill_(
                1
                # The published code leaves them as memory happens to be; its loss then is NaN at
                # times
            )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.03 * arguments.batch / 256)
    settings = types.SimpleNamespace(
        distributed=False,
        epochs=20,
        print_freq=10**9,
        train_mask=True,
        nb_classes=CLASSES,
        pull_constraint=True,
        pull_constraint_coeff=1.0,
    )
    settings.no_pgp, settings.g_perturb_type = True, "None"
    images = torch.rand(
        arguments.batch, 3, size["img_size"], size["img_size"], device=arguments.device
    )
    labels = torch.randint(0, CLASSES // TASKS, (arguments.batch,), device=arguments.device)
    class_mask = [list(range(task * 10, task * 10 + 10)) for task in range(TASKS)]
    criterion = torch.nn.CrossEntropyLoss()

    def steps(count: int) -> None:
        kind = torch.device(arguments.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=arguments.autocast):
            train_one_epoch(
                model,
                original,
                None,
                None,
                criterion,
                [(images, labels)] * count,
                optimizer,
                arguments.device,
                0,
                1.0,
                True,
                0,
                class_mask,
                settings,
            )

    steps.model = model
    return steps


if __name__ == "__main__":
    main()
