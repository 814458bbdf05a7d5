"""The command line: what it imports, what it finds, and how it ends."""

import ast
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from soft_jax import commands
from soft_jax.__main__ import main
from soft_jax.config import DEFAULTS
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
        "from soft_jax.__main__ import main; main(['train', '--help'])",
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
    Path("vit_cil").touch()  # a name stays one of ours
    Path("mine.py").touch()
    assert commands.find_config("vit_cil") == f"{ROOT}/configs/vit_cil.py"
    assert commands.find_config("./mine.py:a=1") == "mine.py:a=1"
    for wrong, nearest in (("vit_cli", "vit_cil"), ("min.py", "mine.py"), ("digits.py", "digits")):
        message = f"config '{wrong}' is unknown; did you mean '{nearest}'?"
        with pytest.raises(UserError, match=re.escape(message)):
            commands.find_config(wrong)


def test_an_installed_package_finds_its_own_configs(tmp_path, monkeypatch):
    """They come inside it; a folder `configs` beside it is of another package."""
    for folder, name in (("site/soft_jax/configs", "vit_cil"), ("site/configs", "theirs")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{name}.py").touch()
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "site/soft_jax/commands.py"))
    assert commands.find_config("vit_cil") == f"{tmp_path}/site/soft_jax/configs/vit_cil.py"
    with pytest.raises(UserError, match="config 'theirs' is unknown; known are vit_cil"):
        commands.find_config("theirs")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=vit_cil:tasks=20", "--config.epochs=3"],
        ["--config", "vit_cil:tasks=20", "--config.epochs", "3"],
    ],
)
def test_flags_are_those_of_the_call(arguments):
    """Not those of the program: whoever calls `main` with a list has another sys.argv."""
    program = (
        "from soft_jax.experiment import loop\n"
        "loop.run = lambda config, workdir: print(config.tasks, config.epochs, workdir)\n"
        "from soft_jax.__main__ import main\n"
        f"main(['train', *{arguments}])\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "20 3 runs/vit_cil-dualprompt+softtf-20x-seed42\n"


def test_help_for_train_names_its_flags_and_every_setting():
    done = python("-m", "soft_jax", "train", "--help")
    assert done.returncode == 0, done.stderr
    for name in ("workdir", "distributed", *(f"config.{field}" for field in DEFAULTS)):
        assert f"  --{name}" in done.stdout


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
    data = [
        file.relative_to(ROOT / "soft_jax")
        for file in (ROOT / "soft_jax").rglob("*.*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    ]
    assert data
    patterns = project["tool"]["setuptools"]["package-data"]["soft_jax"]
    assert [file for file in data if not any(file.match(pattern) for pattern in patterns)] == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "--config=vit_cli"], 1, "config 'vit_cli' is unknown; did you mean 'vit_cil'?"),
        (["train", "--config=no/digits.py"], 1, "config 'no/digits.py' is unknown"),
        (["train", "--config.epoch=3"], 1, "setting 'epoch' is unknown; did you mean 'epochs'?"),
        (["train", "--config.shots[0]=3"], 1, "did you mean 'shots'?"),
        (["train", "--config.epochs=many"], 1, "error: flag --config.epochs=many: invalid"),
        (["train", "--workdr=x"], 1, "Did you mean: workdir"),
        (["train", "digits"], 1, "error: unexpected argument 'digits'; flags are --config, "),
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


@pytest.mark.parametrize(
    ("command", "module", "message"),
    [
        (["train", "--config=digits"], "ml_collections", f"Stopped; {commands.CONTINUES}\n"),
        (["train", "--config=digits"], "jax", f"Stopped; {commands.CONTINUES}\n"),
        (["train", "--config=digits"], "soft_jax.data.sources", f"Stopped; {commands.CONTINUES}\n"),
        (["predict", "nowhere", "a.png"], "jax", "Stopped\n"),
    ],
)
def test_ctrl_c_before_the_run_is_one_line(tmp_path, command, module, message):
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
        f"console({command})\n"
    )
    done = python("-c", program, cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr == message


@pytest.mark.parametrize(
    ("command", "arguments", "told"),
    [
        ("predict", ["w", "a.png"], "error: full\n"),
        ("table", ["7"], f"error: full; {commands.CONTINUES}\n"),
    ],
)
def test_a_failing_disk_is_one_line(monkeypatch, capsys, command, arguments, told):
    def fail(_):
        raise OSError("full")

    monkeypatch.setattr(commands, command, fail)
    assert main([command, *arguments]) == 1
    assert capsys.readouterr().err == told
