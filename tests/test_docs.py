"""README and docs: every command is run or says why not, and no page says what is no longer so.

Commands are run in this process, on the tiny backbone, in one folder that has what they name. The
first run on the user's folder is trained for real, with its settings made small; what the other
commands would train is checked up to the point where it would begin, and commands that read a run
are given a copy of that one. The site's own links are checked when it is built (`.ci/run`).
"""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from soft_jax import commands, library_commands
from soft_jax.__main__ import main
from soft_jax.config import Config
from soft_jax.evaluation import pictures
from soft_jax.experiment import library, loop, planned
from soft_jax.experiment import settings as settings_lib
from soft_jax.inference import rules
from soft_jax.models import backbones
from soft_jax.models.clip import CLIPConfig
from soft_jax.paper import tables
from soft_jax.store import formats
from tests.conftest import hardly_optimized
from tests.small import SMALL as ARCHITECTURE
from tests.small import first_two_layers

# ml_collections reads config files by a function that Python deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
WITH_LINKS = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]
# What the folder's first run is trained with, in the place of what the command says.
# Without masks, whose Gradient ID takes most of the time to compile.
SMALL = {
    "method": "dualprompt",
    "epochs": 1,
    "batch_size": 8,
    "eval_batch_size": 8,
    "prototype_features": 40,
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "e_prompt_layers": (2,),
    "g_prompt_layers": (1,),
}
# The same of the first run on CLIP, which has tasks to identify but no masks either.
SMALL_CLIP = {name: SMALL[name] for name in SMALL if not name.endswith("_layers")} | {
    "method": "clipprompt",
    "text_context_length": 2,
}
CLIP = CLIPConfig(
    image_size=16,
    patch_size=8,
    dim=16,
    depth=1,
    heads=2,
    mlp_dim=16,
    text_dim=8,
    text_depth=1,
    text_heads=1,
    text_mlp_dim=8,
    embed_dim=8,
    quick_gelu=True,
)

sys.path.insert(0, str(ROOT / "docs"))
import settings_table

sys.path.pop(0)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a page, as one line, and why it is not run; empty where it is."""

    page: str
    line: str
    not_run: str

    @property
    def words(self) -> list[str]:
        """Return the words without comments, and without the file that the output goes to."""
        words = shlex.split(self.line, comments=True)
        return words[: words.index(">")] if ">" in words else words


def blocks(page: Path, language: str):
    """Yield the code blocks of a page, and why each is not run."""
    pattern = r"(?:<!-- not run: (.+?) -->\n)?^```(\w+)\n(.*?)^```$"
    for reason, of, code in re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE):
        if of == language:
            yield code, reason


COMMANDS = [
    Command(page.name, line, reason)
    for page in PAGES
    for code, reason in blocks(page, "bash")
    for line in code.replace("\\\n", "").splitlines()
]


@pytest.fixture(scope="module")
def workplace(backbone, tmp_path_factory):
    """A folder with what the pages' commands name, and small runs. Yields the configs that the
    commands trained, or would have.
    """
    folder = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    for number, name in enumerate(("cat", "cow", "dog", "pig")):
        (folder / "photos/train" / name).mkdir(parents=True)
        for image in range(12):
            levels = rng.integers(60 * number, 60 * number + 40, (16, 16, 3), np.uint8)
            Image.fromarray(levels).save(folder / f"photos/train/{name}/{image}.png")
    for name in ("new_photos", "folder", "weights"):
        shutil.copytree(folder / "photos/train/cat", folder / name)
    for name in ("photo.jpg", "other.png"):
        shutil.copy(folder / "photos/train/dog/0.png", folder / name)
    (folder / "tasks.json").write_text(json.dumps([["cat", "cow"], ["dog", "pig"]]))
    trained: list[Config] = []
    first: dict[str, list] = {}  # the manifests of the run that is trained on each page
    run = loop.run
    tiny = backbones.Backbone("tiny", ARCHITECTURE, first_two_layers(backbone), "0" * 64)
    clip = backbones.Backbone("clip", CLIP, _clip_params(), "1" * 64)

    def small_run(config, workdir, *others, **options):
        trained.append(config)
        if options.get("start"):  # a library's, which has small settings already
            return run(config, workdir, *others, **options)
        for page, settings in (("README.md", SMALL), ("clip.md", SMALL_CLIP)):
            if page not in first:
                small = settings_lib.drop_unused(dataclasses.asdict(config) | settings)
                first[page] = run(Config(**small), workdir, *others)
                break
        return first["README.md"]

    def finished(runs, console, figures=True, jobs=1):
        trained.extend(each.config for each in runs)
        for each in runs:
            each.folder.mkdir(parents=True, exist_ok=True)
        return [first["README.md"] for _ in runs]

    read_config = commands.read_config

    def small_config(*flags):
        return Config(**settings_lib.drop_unused(dataclasses.asdict(read_config(*flags)) | SMALL))

    def everything_passes(gate):
        object.__setattr__(gate, "max_drop", 100.0)

    on_folders = [command for command in COMMANDS if "dataset=folder" in command.line]
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        hardly_optimized(),
    ):
        patch.chdir(folder)
        patch.setattr(backbones, "load", lambda name, *_: clip if "clip" in name else tiny)
        patch.setattr(loop, "run", small_run)
        patch.setattr(planned, "run", finished)
        patch.setattr(pictures, "draw", lambda *_: [])
        patch.setattr(tables, "make", lambda *_: ("", True))
        patch.setattr(library_commands.commands, "read_config", small_config)
        # What falls on a backbone of random numbers is not what the pages tell.
        patch.setattr(library.Gate, "__post_init__", everything_passes)
        for page in ("README.md", "clip.md"):
            command = next(command for command in on_folders if command.page == page)
            assert main(command.words[1:]) == 0
        for copy in ("cifar100", "a", "b", "digits"):
            shutil.copytree("runs/photos", f"runs/{copy}")
        yield trained


def _clip_params():
    images, ids = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 3), int)
    return jax.device_get(CLIP.module().init(jax.random.key(0), images, ids)["params"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.line}")
def test_every_command_is_run_or_says_why_not(command, workplace, capsys):
    if command.not_run:
        return
    if command.words[0] in ("mkdir", "python"):
        words = [sys.executable if word == "python" else word for word in command.words]
        subprocess.run(words, check=True)
        return
    assert command.words[0] == "soft-jax", "not run here: mark it <!-- not run: why -->"
    before = len(workplace)
    assert main(command.words[1:]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out or len(workplace) > before


def test_python_of_a_library_runs(workplace, capsys):
    for code, _ in blocks(ROOT / "docs/library.md", "python"):
        exec(code, namespace := {})
    assert namespace["version"].state == "active"
    assert namespace["task"] in namespace["predictor"].task_names == ("low", "high")


def test_python_of_the_page_runs(workplace, capsys):
    namespace: dict = {}
    for code, _ in blocks(ROOT / "docs/python.md", "python"):
        exec(code, namespace)
    assert len(namespace["names"]) == 2
    assert namespace["config"] in workplace


def test_every_setting_has_its_text():
    fields = {field.name for field in dataclasses.fields(Config)}
    about = [name for group in settings_table.ABOUT.values() for name in group]
    assert len(about) == len(set(about))
    assert set(about) == fields
    for name, meaning in settings_table.meanings().items():
        assert len(meaning) > len("A word."), f"{name} has no meaning: comment it in config.py"
    for group in settings_table.ABOUT.values():
        for name, about in group.items():
            assert about.unit, f"{name} has no unit"
            assert about.source, f"{name} has no source"


def test_the_page_of_settings_gets_its_tables():
    page = [(ROOT / "docs/settings.md").read_text()]
    assert page[0].count(settings_table.MARKER) == 1
    settings_table.fill_page(None, "settings", page)
    for field in dataclasses.fields(Config):
        assert f"| `{field.name}`" in page[0]
    assert "| `learning_rate` | The optimizer's: × batch_size / 256. | `0.03` |" in page[0]
    assert "`10+11+12`" in page[0]


def test_every_protocol_is_explained():
    page = (ROOT / "docs/protocols.md").read_text()
    of_shots = {"gradient_vote": rules.GradientVote(7).name}
    for name, rule in rules.RULES.items():
        key = f"{rule.grouping}/{of_shots.get(name) or rule.name}"
        assert f"| `{key}` | {rules.title(key)} |" in page


def test_every_format_is_explained():
    page = (ROOT / "docs/formats.md").read_text()
    found: dict[str, list[int]] = {}
    for kind, number in re.findall(r"^\| (?:(\w+)[^|]*)?\| (\d+) \|", page, re.MULTILINE):
        kind = kind or list(found)[-1]  # empty cells go on with the kind above
        found.setdefault(kind, []).append(int(number))
    assert found == {kind: list(range(len(m) + 1)) for kind, m in formats.MIGRATIONS.items()}


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{target} is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_fit(page):
    """But for tables, whose rows can't be broken."""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert len(line) <= 100 or line.startswith("|"), f"line {number} has {len(line)} signs"
