"""The command line: what it imports, what it finds, and how it ends."""

import ast
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from soft_jax import commands
from soft_jax.errors import UserError

ROOT = Path(__file__).parent.parent


def python(*arguments, cwd=ROOT, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


@pytest.mark.parametrize(
    "statement",
    [
        "import soft_jax.config",
        "from soft_jax.__main__ import main; main(['--help'])",
        "from soft_jax.__main__ import main; main(['table', '--help'])",
    ],
)
def test_what_needs_no_arrays_imports_none(statement):
    """Not jax, not NumPy: help and settings are there at once."""
    slow = "{'jax', 'numpy', 'PIL', 'ml_collections', 'tensorflow_datasets', 'rich'}"
    program = (
        f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\n"
        f"print(sorted({slow} & set(sys.modules)), file=sys.stderr)"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands.find_config("vit_cil:tasks=20") == f"{ROOT}/configs/vit_cil.py:tasks=20"
    assert commands.find_config("configs/mine.py:a=1") == "configs/mine.py:a=1"
    with pytest.raises(UserError, match="config 'vit_cli' is unknown; did you mean 'vit_cil'?"):
        commands.find_config("vit_cli")


def test_all_that_is_installed_is_listed():
    """The packages on disk, the configs, the assets, and the console command."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    there = {"soft_jax"} | {
        f"soft_jax.{path.parent.name}" for path in (ROOT / "soft_jax").glob("*/__init__.py")
    }
    assert listed == there | {"soft_jax.configs"}
    assert project["tool"]["setuptools"]["package-dir"] == {"soft_jax.configs": "configs"}
    module, _, function = project["project"]["scripts"]["soft-jax"].partition(":")
    source = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    assert function in {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    imports = [
        node.module for node in ast.walk(source) if isinstance(node, ast.ImportFrom) if node.module
    ]
    assert "soft_jax" in imports


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "--config=vit_cli"], 1, "config 'vit_cli' is unknown; did you mean 'vit_cil'?"),
        (["train", "--config=digits:density=0.5"], 1, "density: 0.5 has no effect with method"),
        (["train", "--config=digits:method=sotftf"], 1, "method: 'sotftf' is unknown"),
        (["table", "7", "--benchmark=c100"], 1, "--benchmark: benchmark 'c100' is unknown"),
        (["table", "77", "--list"], 1, "table: '77' is unknown"),
        (["predict", "nowhere", "a.png"], 1, "workdir: nowhere holds no run"),
    ],
)
def test_a_wrong_word_is_one_line(tmp_path, arguments, status, message):
    done = python("-m", "soft_jax", *arguments, cwd=tmp_path)
    assert done.returncode == status
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["ml_collections", "jax", "soft_jax.data.sources"])
def test_ctrl_c_before_the_run_is_one_line(tmp_path, module):
    """While settings, jax or ourselves are imported: strike when the module is first asked for."""
    program = (
        "import os, signal, sys\n"
        "def strike(event, args):\n"
        f"    if event == 'import' and args[0] == {module!r} and not struck:\n"
        "        struck.append(1)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "struck = []\n"
        "sys.addaudithook(strike)\n"
        "from soft_jax.__main__ import console\n"
        "sys.argv = ['soft-jax', 'train', '--config=digits']\n"
        "console()\n"
    )
    done = python("-c", program, cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr.splitlines()[-1].endswith("the same command continues")
    assert "Traceback" not in done.stderr
