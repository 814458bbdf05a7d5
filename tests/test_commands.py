"""The command line: what it imports, what it finds, and how it ends."""

import ast
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from soft_jax import commands, distributed
from soft_jax.__main__ import main
from soft_jax.config import DEFAULTS
from soft_jax.errors import UserError
from soft_jax.experiment import settings
from soft_jax.inference import rules
from soft_jax.inference.predictor import Prediction, Predictor
from soft_jax.store.folder import Reader
from tests.conftest import ROOT, python

NO_ARRAYS = {"jax", "numpy", "PIL", "ml_collections", "tensorflow_datasets", "rich"}


def imported(statement, slow):
    """Those of the packages `slow` that a program has when it has run a statement."""
    program = (
        f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\n"
        f"print(*{slow} & set(sys.modules), file=sys.stderr)\nprint('end', file=sys.stderr)"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    *_, found, end = done.stderr.splitlines()
    assert end == "end"
    return set(found.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import soft_jax.config",
        "from soft_jax.__main__ import main; main(['--help'])",
        "from soft_jax.__main__ import main; main(['table', '--help'])",
        "from soft_jax.__main__ import main; main(['train', '--help'])",
        "from soft_jax.__main__ import main; main(['sweep', '--help'])",
        "from soft_jax.__main__ import main; main(['predict', '--help'])",
        "from soft_jax.__main__ import main; main(['compare', '--help'])",
    ],
)
def test_what_needs_no_arrays_imports_none(statement):
    """Not jax, not NumPy: help and settings are there at once."""
    assert imported(statement, NO_ARRAYS) == set()


@pytest.mark.parametrize(
    ("module", "slow"),
    [
        ("experiment.loop", {"sklearn", "scipy.optimize", "tensorflow_datasets"}),
        ("inference.predictor", {"sklearn", "scipy.optimize", "matplotlib", "optax"}),
    ],
)
def test_what_few_runs_need_is_imported_where_it_is_used(module, slow):
    """scikit-learn alone takes more than a second of CPU."""
    assert imported(f"import soft_jax.{module}", slow) == set()


def test_a_wrong_flag_is_answered_before_jax_is_imported():
    program = (
        "import sys\nfrom soft_jax import commands\ntry:\n"
        "    commands.train(['--config=vit_cil', '--config.epochs=2', '--jobs=2'])\n"
        "except commands.UserError as error:\n"
        "    print(error, 'jax' in sys.modules)"
    )
    assert python("-c", program).stdout.endswith("or leave it out False\n")


def test_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands.find_config("vit_cil:tasks=20") == f"{ROOT}/configs/vit_cil.py:tasks=20"
    Path("vit_cil").touch()  # a name stays one of ours
    Path("mine.py").touch()
    assert commands.find_config("vit_cil") == f"{ROOT}/configs/vit_cil.py"
    assert commands.find_config("./mine.py:a=1") == "mine.py:a=1"
    monkeypatch.setenv("HOME", str(tmp_path))
    for wrong, message in (
        ("vit_cli", "config 'vit_cli' is unknown; did you mean 'vit_cil'?"),
        ("min.py", "there is no file min.py; did you mean 'mine.py'?"),
        ("digits.py", "there is no file digits.py; did you mean 'digits'?"),
        ("~/none/c.py:tasks=3", f"there is no file {tmp_path}/none/c.py; "),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            commands.find_config(wrong)
    os.mkfifo("fifo")
    os.mkfifo("fifo.py")
    Path("photo.png").touch()
    Path("folder.py").mkdir()
    for other in ("./fifo", "fifo.py:tasks=3", "./photo.png", "folder.py", "/dev/zero"):
        shown = str(Path(other.partition(":")[0]))
        with pytest.raises(UserError, match=f"^{re.escape(shown)} is no config; a config is a fi"):
            commands.find_config(other)


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
        ["-config.epochs=3", "--config=vit_cil:tasks=20,epochs=2"],  # before the argument's
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


def read_config(*flags):
    return commands._read_flags(flags, commands.TRAIN_FLAGS).config


# ml_collections imports a config file in a way that Python will drop.
reads_a_config = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")


@reads_a_config
@pytest.mark.parametrize("text", ["10-12", "10+11+12", "10,11,12", "(10, 11, 12)", "[10,11,12]"])
def test_a_list_in_a_flag_is_written_as_in_an_argument_or_as_in_python(text):
    config = read_config("--config=vit_cil:layers=3", f"--config.mask_layers={text}")
    assert config.mask_layers == (10, 11, 12)
    assert config.e_prompt_layers == (3,)
    both = read_config("--config=vit_cil", f"--config.layers={text}")
    assert both.mask_layers == both.e_prompt_layers == (10, 11, 12)


@reads_a_config
def test_flags_of_every_type_are_read():
    config = read_config(
        "--config=digits",
        *("--config.flip", "--noconfig.cache_queries", "--config.crop_scale=0.1-0.9"),
        *("--config.learning_rate=1e-3", "--config.data_dir=a,b=c", "--config.shots", "3,0"),
    )
    assert (config.flip, config.cache_queries, config.crop_scale) == (True, False, (0.1, 0.9))
    assert (config.learning_rate, config.data_dir, config.shots) == (0.001, "a,b=c", (3, 0))


@reads_a_config
def test_flags_are_read_twice_in_one_program():
    assert [read_config("--config=digits:epochs=3").epochs for _ in range(2)] == [3, 3]


@reads_a_config
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=a", "--workdir=b"], "--workdir is given twice, as 'a' and as 'b'"),
        (["--config=digits", "--config", "vit_cil"], "--config is given twice, as 'digits' and as"),
        (["--config.flip", "--noconfig.flip"], "--config.flip is given twice, as 'true' and as 'f"),
        (["--config.seed=1", "--config.seed=1"], "--config.seed is given twice, as '1' and as '1'"),
        (
            ["--config.layers=3", "--config.mask_layers=4"],
            "--config.layers and --config.mask_layers both set mask_layers",
        ),
    ],
)
def test_a_flag_that_is_given_twice_is_refused(flags, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        read_config(*flags)


@reads_a_config
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("digits", ["scenario=file", "scenario_file=t.json"]),
        ("digits", ["method=head"]),
        ("library", ["method=adapter"]),
    ],
)
def test_a_flag_leaves_nothing_of_the_config_s_own_without_effect(name, flags):
    config = read_config(f"--config={name}", *(f"--config.{flag}" for flag in flags))
    settings.check(config)
    for flag in flags:
        field, _, value = flag.partition("=")
        assert getattr(config, field) == value
    kept = read_config(f"--config={name}")
    assert (config.epochs, config.eval_batch_size) == (kept.epochs, kept.eval_batch_size)


@reads_a_config
def test_what_a_user_set_or_a_file_has_in_vain_is_refused(tmp_path):
    flags = ("--config.scenario=file", "--config.scenario_file=t.json")
    message = "tasks: 4 has no effect with scenario 'file'"
    for given in (
        ["--config=digits", "--config.tasks=4"],
        ["--config=digits:tasks=4"],
        ["--config=table:table=7,row=5,tasks=4"],
    ):
        with pytest.raises(UserError, match=message):
            settings.check(read_config(*given, *flags))
    own = tmp_path / "own.py"
    own.write_text(
        "from soft_jax.config import config_dict\n"
        "def get_config():\n"
        "    return config_dict(scenario='file', scenario_file='t.json', tasks=4)\n"
    )
    with pytest.raises(UserError, match=message):
        settings.check(read_config(f"--config={own}", "--config.epochs=2"))


@reads_a_config
def test_a_file_may_need_its_flags(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "from soft_jax.config import config_dict\n"
        "def get_config():\n"
        "    return config_dict(method='mine', tasks=4)\n"
    )
    flags = ("--config.method=head", "--config.scenario=file", "--config.scenario_file=t.json")
    config = read_config(f"--config={own}", *flags)
    settings.check(config)
    assert (config.method, config.tasks) == ("head", DEFAULTS["tasks"])


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
        (["train", "--config=no/digits.py"], 1, "--config: there is no file no/digits.py; did you"),
        (["train", "--config.epoch=3"], 1, "setting 'epoch' is unknown; did you mean 'epochs'?"),
        (["train", "--config.shots[0]=3"], 1, "did you mean 'shots'?"),
        (["train", "--config.epochs=1e1"], 1, "error: flag --config.epochs=1e1: '1e1' is not of"),
        (["train", "--config.mask_layers=3-x"], 1, "is not one or more whole numbers, such as 10-"),
        (["train", "--config.layers=3-x"], 1, "flag --config.layers=3-x: '3-x' is not one or more"),
        (["train", "--config.layers=12-10"], 1, "'12-10' has the range '12-10', which goes back"),
        (["train", "--config.shots=0-9999999999999999999"], 1, "is more than 10,000 numbers"),
        (["train", "--config.name=../../x"], 1, "error: name: '../../x' can't begin a folder's"),
        (["train", "--config.name=http://x", "--seeds=2"], 1, "error: name: 'http://x' can't beg"),
        (["train", "--config.name="], 1, "error: name: '' can't begin a folder's name in runs/"),
        (["train", "--distributed=nope"], 1, 'error: distributed: \'nope\': expected "auto" or "H'),
        (["train", "--config.epochs"], 1, "error: --config.epochs: write --config.epochs=VALUE"),
        (
            ["train", "--config.tasks=5", "--config.tasks", "2"],
            1,
            "error: --config.tasks is given twice, as '5' and as '2'; give it once",
        ),
        (["train", "--config=gs://b/c.py"], 1, "--config: file: 'gs://b/c.py' is a URL"),
        (["train", "--workdir=s3://b/run"], 1, "error: --workdir: 's3://b/run' is a URL"),
        (["sweep", "--config.epoch=3"], 1, "setting 'epoch' is unknown; did you mean 'epochs'?"),
        (["sweep", "--set=epochs=1", "--workdir=s3://b/s"], 1, "--workdir: 's3://b/s' is a URL"),
        (["train", "--workdr=x"], 1, "error: flag 'workdr' is unknown; did you mean 'workdir'?"),
        (["trian"], 1, "error: command 'trian' is unknown; did you mean 'train'?"),
        (["train", "digits"], 1, "error: unexpected argument 'digits'; flags are --config, "),
        (["train", "--config=digits:density=0.5"], 1, "density: 0.5 has no effect with method"),
        (["train", "--config=digits:method=sotftf"], 1, "method: 'sotftf' is unknown"),
        (["table", "7", "--benchmark=c100"], 1, "--benchmark: 'c100' is unknown"),
        (["table", "77", "--list"], 1, "table: '77' is unknown"),
        (["predict", "nowhere", ""], 1, "error: images: '' is no path; give a file or a folder"),
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
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command; soft-jax --help says more"),
        (["--hep"], "flag 'hep' is unknown; did you mean 'help'?"),
        (["xyzzy"], "command 'xyzzy' is unknown; known are train, sweep, predict, table, "),
        (["predict", "run"], "the following arguments are required: images; soft-jax predict --"),
        (["predict", "run", "a.png", "--jsn"], "flag 'jsn' is unknown; did you mean 'json'?"),
        (["predict", "run", "a.png", "--back=x"], "flag 'back' is unknown; known are help, task-"),
        (["predict", "run", "a.png", "--top"], "argument --top: expected one argument; soft-jax"),
        (["merge", "lib", "a", "--ino=c"], "flag 'ino' is unknown; did you mean 'into'?"),
        (["compare", "a", "b", "c"], "unexpected argument 'c'; soft-jax compare --help says more"),
        (["learn", "lib", "a", "digits", "--class=1"], "flag 'class' is unknown; did you mean 'c"),
        (["learn", "lib", "a", "digits", "--confg=x"], "flag 'confg' is unknown; did you mean 'c"),
        (["tidy", "lib", "--keep-versions=1", "--keep-versions=2"], "--keep-versions is given tw"),
    ],
)
def test_what_argparse_refuses_is_one_line_of_ours(capsys, arguments, message):
    """Nor is a part of a flag's name the flag."""
    assert main(arguments) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not printed.out


def test_what_begins_as_a_flag_may_be_a_path_behind_two_dashes(capsys):
    assert main(["predict", "--", "-run", "-a.png"]) == 1
    assert "-run holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", " ", ".", "..", ".hidden", "a/b", "/a", "a\0"])
def test_a_name_that_leads_out_of_runs_is_refused(name):
    config = SimpleNamespace(**DEFAULTS | {"name": name})
    for of_seeds in (True, False):
        with pytest.raises(UserError, match="^name: .* can't begin a folder's name in runs/; exp"):
            commands.default_workdir(config, "softtf", of_seeds)


def test_a_default_folder_may_have_any_plain_name():
    config = SimpleNamespace(**DEFAULTS | {"name": "my run-2.1"})
    assert commands.default_workdir(config, "wsn", True) == Path("runs/my run-2.1-wsn-10x")


@pytest.mark.parametrize(
    "others",
    [
        "nope",
        "",
        "host:1,0",
        "host:1,0,2,3",
        "host:1,x,2",
        "host:1,0,1e1",
        "host,0,2",
        "host:1,2,2",
        "host:1,-1,2",
        f"host:1,0,{'9' * 5000}",
    ],
)
def test_what_names_no_processes_is_told_in_our_words(monkeypatch, others):
    monkeypatch.setattr(distributed.jax.distributed, "initialize", None)
    with pytest.raises(UserError) as caught:
        distributed.join(others)
    assert str(caught.value).startswith(f'distributed: {others!r}: expected "auto" or "HOST:PORT,')


def test_processes_are_joined_as_they_are_named(monkeypatch):
    joined = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *a: joined.append(a))
    for others in ("auto", "host:1234,0,2", "[::1]:1234, 1, 2"):
        distributed.join(others)
    assert joined == [(), ("host:1234", 2, 0), ("[::1]:1234", 2, 1)]


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


CLASSES = ("foo", "bar", "baz", "qux")  # of two tasks, two each


class FakePredictor:
    """Answers each file with the same: bar of task 1, by the network of task 2."""

    class_names = CLASSES
    task_names = (1, 2)
    model = SimpleNamespace(task_of_class=np.array([0, 0, 1, 1]))
    rule = rules.PromptId()
    chosen_because = "the best of all"

    def predict_chunks(self, files, task):
        self.asked = task
        good = [i for i, file in enumerate(files) if "bad" not in str(file)]
        bad = {i: UserError(f"{files[i]} is bad") for i in range(len(files)) if i not in good}
        probabilities = np.tile(np.float32([0.1, 0.6, 0.3, 0.0]), (len(good), 1))
        one, zero = np.ones(len(good), int), np.zeros(len(good), int)
        yield (
            good,
            Prediction(classes=one, tasks=zero, networks=one, probabilities=probabilities),
            bad,
        )


@pytest.fixture
def predict(monkeypatch, capsys):
    """Run `predict` on a run with the finished tasks 1 and 2: status, outputs, what was loaded."""
    predictor, loaded = FakePredictor(), []

    def load(workdir, tasks, task_id, **_):
        loaded.append((tasks, task_id))
        return predictor

    monkeypatch.setattr(Predictor, "load", load)
    monkeypatch.setattr(Reader, "present", lambda _: [0, 1])

    def run(*arguments):
        status = main(["predict", "run", *arguments])
        printed = capsys.readouterr()
        return SimpleNamespace(
            status=status,
            out=printed.out,
            err=printed.err,
            loaded=loaded,
            asked=getattr(predictor, "asked", None),
        )

    return run


def test_a_line_has_the_classs_own_task_and_the_network_that_answered(predict):
    done = predict("a.png")
    assert done.out == "a.png: bar (task 1), probability 0.6000, by task 2's network\n"
    assert done.status == 0
    assert done.loaded == [(None, None)]


def test_a_network_of_the_classs_own_task_is_not_named(predict, monkeypatch):
    monkeypatch.setattr(FakePredictor.model, "task_of_class", np.array([0, 1, 1, 1]))
    assert predict("a.png").out == "a.png: bar (task 2), probability 0.6000\n"


def test_the_rule_that_is_used_and_why_is_told_beside_the_answers(predict):
    told = "Task identity: CIL per_sample, Prompt ID; the best of all\n"
    assert predict("a.png").err == told
    assert predict("a.png", "--task=1").err == ""  # no image is identified


def test_top_gives_the_answer_and_then_the_next_most_probable_classes(predict):
    lines = predict("a.png", "--top=5").out.splitlines()
    assert lines[1:] == [
        "  2. baz (task 2), probability 0.3000",
        "  3. foo (task 1), probability 0.1000",
    ]  # qux could not win
    assert len(predict("a.png", "--top=2").out.splitlines()) == 2


def test_the_answer_is_first_where_another_class_is_more_probable(predict, monkeypatch):
    def answer(self, files, task):
        probabilities = np.float32([[0.5, 0.2, 0.3, 0.0]])
        yield (
            [0],
            Prediction(np.ones(1, int), np.zeros(1, int), np.zeros(1, int), probabilities),
            {},
        )

    monkeypatch.setattr(FakePredictor, "predict_chunks", answer)
    lines = predict("a.png", "--top=3").out.splitlines()
    assert [re.search("foo|bar|baz", line)[0] for line in lines] == ["bar", "foo", "baz"]


def test_json_and_csv_count_tasks_from_1(predict):
    answer = {"class": "bar", "class_index": 1, "task": 1, "network": 2, "probability": 0.6}
    assert json.loads(predict("a.png", "--json").out) == {"file": "a.png", **answer}
    top = json.loads(predict("a.png", "--json", "--top=2").out)["top"]
    assert [each["class"] for each in top] == ["bar", "baz"]
    rows = list(csv.DictReader(io.StringIO(predict("a.png", "--csv", "--top=2").out)))
    answer |= {"file": "a.png", "rank": 1, "error": ""}
    assert rows[0] == {name: str(value) for name, value in answer.items()}
    assert [row["class"] for row in rows] == ["bar", "baz"]


def test_a_bad_image_has_its_own_line_in_every_form(predict):
    assert predict("a.png", "bad.png").status == 1
    assert "error: bad.png is bad" in predict("a.png", "bad.png").err
    assert json.loads(predict("bad.png", "--json").out) == {
        "file": "bad.png",
        "error": "bad.png is bad",
    }
    (row,) = csv.DictReader(io.StringIO(predict("bad.png", "--csv").out))
    assert (row["file"], row["error"], row["class"]) == ("bad.png", "bad.png is bad", "")


def test_a_file_name_that_is_no_utf_8_is_one_in_every_form(predict):
    assert json.loads(predict("a\udcff.png", "--json").out)["file"] == "a\\xff.png"
    assert json.loads(predict("bad\udcff.png", "--json").out)["file"] == "bad\\xff.png"
    (row,) = csv.DictReader(io.StringIO(predict("a\udcff.png", "--csv").out))
    assert row["file"] == "a\\xff.png"
    assert predict("a\udcff.png").out.startswith("a\\xff.png: ")


def test_tasks_are_given_counted_from_1(predict):
    assert predict("a.png", "--tasks=1,2").loaded == [([0, 1], None)]
    done = predict("a.png", "--task=2")
    assert (done.loaded[-1], done.asked) == ((None, rules.TaskGiven.option), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=²"], "--tasks: '²' is not a whole number from 1 on"),
        (["--tasks=0,1"], "--tasks: '0' is not a whole number from 1 on"),
        (["--tasks=1,"], "--tasks: '' is not a whole number from 1 on"),
        (["--tasks="], "--tasks: '' is not a whole number from 1 on"),
        (["--tasks=" + "9" * 5000], "--tasks: '999"),
        (["--tasks=1,3"], "--tasks: 3 is not a task to choose from; those are 1, 2"),
        (["--task=3"], "--task: 3 is not a task to choose from; those are 1, 2"),
        (["--tasks=1", "--task=2"], "--task: 2 is not a task to choose from; those are 1"),
        (["--task=²"], "--task: '²' is not a whole number from 1 on"),
        (["--top=0"], "--top: '0' is not a whole number from 1 on"),
        (["b.png", ""], "images: '' is no path; give a file or a folder (is a variable unset?)"),
        (["--json", "--csv"], "--json, --csv: take one of them"),
        (["--top=1", "--top=2"], "--top is given twice, as '1' and as '2'; give it once"),
        (["--task-id=oracle"], "--task-id: 'oracle' needs --task, the task of all images"),
        (["--backbone-path=s3://b/x.npz"], "--backbone-path: 's3://b/x.npz' is a URL"),
    ],
)
def test_what_predict_can_not_use_is_one_line(predict, arguments, message):
    done = predict("a.png", *arguments)
    assert done.status == 1
    assert done.err.startswith(f"error: {message}")
    assert len(done.err.splitlines()) == 1


def test_help_for_predict_spells_no_rules_name():
    text = python("-m", "soft_jax", "predict", "--help").stdout
    assert "counted from 1" in text
    for option in rules.options():
        assert not re.search(rf"\b{option}\b", text), option


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_a_name_that_the_output_has_no_signs_for_ends_nothing(encoding):
    """Of a file that is no UTF-8, and of a class in a locale without UTF-8."""
    program = (
        "import soft_jax.__main__ as program\n"
        "def main(argv):\n"
        "    print('θ', 'a\\udcff.png')\n"
        "    print('all of it')\n"
        "program.main = main\n"
        "program.console([])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\udcff.png" in done.stdout
    assert done.stdout.endswith(b"all of it\n")


def test_a_home_directory_is_found_in_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").touch()
    assert commands.find_config("~/mine.py:a=1") == f"{tmp_path}/mine.py:a=1"
