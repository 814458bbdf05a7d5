"""A training step as the TPU's own compiler makes it; no TPU is needed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs the TPU compiler, libtpu: pip install ".[tpu-compiler]"',
)
def test_a_step_on_four_chips_exchanges_its_gradients_alone_and_once(tmp_path):
    """In a process of its own: libtpu reads its environment once, and keeps no compiled programs
    among those of other tests.
    """
    output = tmp_path / "forecast.json"
    command = [sys.executable, "-m", "benchmarks.tpu", "--slices=v5e-4", "--dtypes=bfloat16"]
    command += ["--backbones=vit_ti8_32", "--programs=step_files", f"--output={output}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr

    (found,) = json.loads(output.read_text()).values()
    assert found["cycles"] > 0
    # No weights or images are gathered, and each gradient, a float32, is summed once: some of them
    # in bfloat16, so that their bytes could not tell once from twice.
    assert set(found["collectives"]) == {"all-reduce"}
    assert 1 <= found["collectives"]["all-reduce"]["numbers"] / (found["gradients"] / 4) < 1.1
