"""The published PyTorch model, in float64, against the functions that training and evaluation
use.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXACT = (
    "prompt_ids",
    "gradient_ids",
    "accuracy_",
    "final_average_",
    "forgetting_",
    "backward_transfer_",
)


def errors_of(trace: str) -> dict[str, float]:
    # A process of its own: float64 is a setting of the whole process.
    done = subprocess.run(
        [sys.executable, "-m", "tests.replay", f"tests/data/{trace}.npz"],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\w+) +(\S+)$", done.stdout, re.M)
    return {name: float(error) for name, error in found}


def test_trace_of_the_clip_host():
    """CLIP-PGP's prompt learner, image prompt, projection, optimizer and CIL protocol."""
    errors = errors_of("clip_host")
    steps = {"loss", "image_prompt_20", "context_20", "first_grad_projected", "by_class_loss"}
    cil = {"eval_logits", "eval_columns", "eval_predictions_cil", "eval_predictions_til"}
    assert steps | cil <= errors.keys()
    for name, error in errors.items():
        assert error <= (0 if name.startswith(("eval_columns", "eval_predictions")) else 1e-10), (
            name,
            error,
        )


@pytest.mark.parametrize(
    "trace", ["softtf", "softtf_interleaved", "dualprompt", "dualprompt_interleaved"]
)
def test_trace(trace):
    errors = errors_of(trace)
    quantities = {
        "first_query",
        "first_logits",
        "first_grad",
        "loss",
        "cross_entropy",
        "key_similarity",
        "grad_norm",
        "trained_arrays",
    }
    quantities |= {
        "prompt_ids",
        "eval_logits_prompt_id",
        "accuracy_prompt_id",
        "accuracy_task_incremental",
    }
    if trace.startswith("softtf"):
        quantities |= {
            "gradient_ids",
            "alpha_gradients",
            "eval_logits_gradient_id",
            "accuracy_gradient_id",
        }
    assert quantities <= errors.keys()
    for name, error in errors.items():
        limit = 1e-12 if name.startswith("first_") else 1e-9 if name.startswith(EXACT) else 1e-8
        assert error <= limit, (name, error)
