"""Pages in a real browser: the reports of a library and of a run, and an explanation, with names
that try to be HTML.
"""

import dataclasses
import errno
import html as stdlib_html
import json
import os
import re
import shutil
import subprocess
import threading
from contextlib import closing

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from soft_jax.__main__ import main
from soft_jax.data import sources
from soft_jax.errors import UserError
from soft_jax.evaluation import html, predictions
from soft_jax.experiment import html_report, library, loop
from soft_jax.experiment.data_spec import Data
from soft_jax.experiment.gate import Gate
from soft_jax.experiment.library import Library
from soft_jax.experiment.run import prepare
from soft_jax.inference import explain
from soft_jax.models import backbones
from soft_jax.store.folder import Store
from soft_jax.store.library import LibraryReader
from tests import test_library
from tests.conftest import TINY, found_instead, tiny_config
from tests.manifests import manifest_of

SETTINGS = {"batch_size": 8, "epochs": 1, "eval_batch_size": 16, "prototype_features": 20}
ODD = (
    "<script>alert(1)</script>",
    "\"quoted\" & 'so'",
    "Ünïcode 猫 \u202eturned\x01",
    "a name of very many letters that no column of a table has any room for",
    "plain",
    "</td></table>",
)
NAMES = ("birds-of-the-north-of-2025", "birds-of-the-north-of-2026", "t2")
SECTIONS = {
    "library": ["tasks", "time", "transfer", "confusion", "weights", "tree", "log"],
    "run": ["figures", "tasks", "time", "matrices", "confusion", "transfer", "weights", "log"],
    "explained": ["rules", "layers", "attention"],
}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def letters():
    """Six classes of `test_library`'s images, with odd names."""
    whole = test_library.letters()
    parts = (
        sources.InMemoryImages(part.images[part.labels < 6], part.labels[part.labels < 6])
        for part in (whole.train, whole.test)
    )
    return sources.Dataset(*parts, ODD)


@pytest.fixture(scope="module", autouse=True)
def _world(backbone):
    tiny = backbones.Backbone("tiny", TINY, backbone, "0" * 64)
    with found_instead(tiny, letters):
        yield


@pytest.fixture(scope="module")
def library_(_world, tmp_path_factory):
    """A library of three tasks that are drawn; one has a candidate. Transfer is measured."""
    root = tmp_path_factory.mktemp("html") / "a <b> library"
    config = tiny_config(method="softtf", tasks=1, **SETTINGS)
    opened = Library(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run", test_library.drawn)
        for task in range(3):
            data = Data("letters", classes=ODD[2 * task : 2 * task + 2])
            given = config if task == 0 else None
            opened.learn(NAMES[task], data, config=given, gate=Gate(100.0))
        opened.learn(NAMES[0], Data("letters", classes=ODD[:2]), gate=Gate(100.0, 100.0))
    ids = [version.id for version in opened.state().active.values()]
    kept = {str(i): {"frozen": 50.0} | {str(j): float(i - j) for j in ids} for i in ids}
    (root / library.TRANSFER_FILE).write_text(json.dumps(kept))
    return root


@pytest.fixture(scope="module")
def run(_world, tmp_path_factory):
    """A finished run of two tasks of prompts; its arrays and figures are drawn."""
    root = tmp_path_factory.mktemp("html") / "run"
    config = tiny_config(method="dualprompt", tasks=2, **SETTINGS)
    rng = np.random.default_rng(0)
    with closing(Store(root)) as store:
        prepared = prepare(config, store, Console(quiet=True), threading.Event(), None, letters())
        method, params = prepared.method, prepared.params
        shapes = {
            "adapter": method.packed_shapes(params),
            "shared": jax.eval_shape(method.init_shared, jax.random.key(0), params),
            "statistics": prepared.statistics_shapes(0),
        }
        for task in range(2):
            items = jax.tree.map(
                lambda like: jax.numpy.asarray(rng.integers(1, 4, like.shape), like.dtype), shapes
            )
            manifest = manifest_of(
                task=task,
                classes=tuple(range(3 * task, 3 * task + 3)),
                class_names=ODD[3 * task : 3 * task + 3],
                num_classes=6,
                num_tasks=2,
                config=dataclasses.asdict(config),
                backbone={"name": "tiny", "sha256": "0" * 64},
                metrics={rule.key: _counts(task) for rule in prepared.evaluated},
            )
            store.save_task(task, items | {"memory": {}}, manifest)
    keys = tuple(rule.key for rule in prepared.evaluated)
    answers = {key: tuple(rng.permutation(ODD)) for key in keys}
    sure = {key: rng.uniform(size=6) for key in keys}
    tasks = np.arange(6) // 3
    found = predictions.Predictions(np.arange(6), ("",) * 6, tasks, ODD, answers, sure)
    predictions.write(root, found, keys[0])
    return root


def _counts(task):
    """Some figures of the tasks up to `task`."""
    row = {"total": 6, "task_correct": 5}
    return [
        {**row, "correct": 4 - task, "identified": {str(of): 5, str(1 - of): 1}}
        for of in range(task + 1)
    ]


@pytest.fixture(scope="module")
def pages(library_, run, tmp_path_factory):
    """All pages by name."""
    folder = tmp_path_factory.mktemp("pages")
    image = folder / 'im"age<1>.png'
    Image.fromarray(letters().test.images[0]).save(image)
    out = folder / "explained.html"
    assert main(["report", str(library_)]) == 0
    assert main(["report", str(run), f"--output={folder / 'run.html'}"]) == 0
    assert main(["explain", str(library_), str(image), f"--output={out}"]) == 0
    assert main(["explain", str(run), str(image)]) == 0
    files = {
        "library": library_ / "report.html",
        "run": folder / "run.html",
        "explained": out,
    }
    return {name: file.read_text("utf-8") for name, file in files.items()}


# Each page in a frame of a phone's and of a desk's width; what can be opened is open. `srcdoc`
# makes the frames the same origin as the page around them, so that it can look into them; no
# script is in the pages themselves.
WRAPPER = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><body>%s
<pre id="found"></pre><script>
function look(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  page.querySelectorAll("details").forEach(d => d.open = true);
  const overlaps = [];
  page.querySelectorAll("svg").forEach(svg => {
    const texts = [...svg.querySelectorAll("text")].map(t => [t, t.getBoundingClientRect()]);
    texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
      if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 &&
          q.top < p.bottom - 3) overlaps.push(a.textContent + " / " + b.textContent);
    }));
  });
  return {
    name: frame.title, width: root.clientWidth, content: root.scrollWidth,
    sections: [...page.querySelectorAll("section")].filter(s => s.offsetHeight > 40).map(s => s.id),
    dark: getComputedStyle(page.body).backgroundColor,
    fetched: frame.contentWindow.performance.getEntriesByType("resource")
      .map(r => r.name).filter(n => !n.startsWith("data:")),
    scripts: page.scripts.length, overlaps: overlaps,
    headings: [...page.querySelectorAll("h1,h2,h3,h4,h5,h6")].map(h => h.tagName).join(""),
    loose: page.querySelectorAll("th:not([scope]), svg:not([role]):not([aria-hidden])").length,
    clipped: [...page.querySelectorAll("svg[role=img] text")].filter(t => {
      const p = t.getBoundingClientRect(), q = t.ownerSVGElement.getBoundingClientRect();
      return p.left < q.left - 1 || p.right > q.right + 1; }).map(t => t.textContent),
  };
}
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(look);
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


def rendered(pages, folder, *flags):
    """What a browser makes of the pages, and what it writes on its console."""
    frames = "".join(
        f'<iframe title="{name}" width="{width}" height="800" '
        f'srcdoc="{stdlib_html.escape(page)}"></iframe>'
        for name, page in pages.items()
        for width in (390, 1280)
    )
    file = folder / "all.html"
    file.write_text(WRAPPER % frames, "utf-8")
    command = [
        *(CHROMIUM, "--no-sandbox", "--headless=new", "--disable-gpu", "--hide-scrollbars"),
        *(f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0"),
        *("--virtual-time-budget=5000", *flags, "--dump-dom", file.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    dom, said = done.stdout.decode(), done.stderr.decode("utf-8", "replace")
    (found,) = re.findall(r'<pre id="found">(.+?)</pre>', dom, re.DOTALL)
    console = [line for line in said.splitlines() if "CONSOLE" in line]
    return json.loads(stdlib_html.unescape(found)), console


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on PATH to render pages with")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_a_browser(pages, tmp_path, scheme):
    """On a phone and on a desk: nothing overflows, nothing is fetched, no console message."""
    flags = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    found, console = rendered(pages, tmp_path, *flags)
    assert console == []
    assert [(page["name"], page["width"]) for page in found] == [
        (name, width) for name in pages for width in (390, 1280)
    ]
    for page in found:
        assert page["content"] <= page["width"], f"{page['name']} overflows"
        assert set(SECTIONS[page["name"]]) <= set(page["sections"])
        assert page["fetched"] == [] and page["scripts"] == 0
        levels = [int(level) for level in re.findall(r"\d+", page["dark"])]
        assert (max(levels) < 64) == (scheme == "dark")
        assert page["overlaps"] == [] and page["clipped"] == []
        assert re.fullmatch("H1(H2(H3)*)+", page["headings"])
        assert page["loose"] == 0


def test_pages_hold_what_they_should(pages):
    """Escaped names, every version, the formula; and an explanation all rules of the library."""
    for page in pages.values():
        assert "<script" not in page and "\x01" not in page and "\u202e" not in page
        assert "http" not in page.replace("http-equiv", "")
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert len(page) < 200_000
    for word in (
        f"{NAMES[0]}@1",
        f"{NAMES[0]}@2",
        "candidate",
        "‖W − θ‖",
        "learn",
        "−1.0",
        "Heads of proj",
    ):
        assert word in pages["library"]
    assert pages["library"].count("<svg") == 3  # two curves and the tree
    for word in ("CIL per_sample, prototype", "oracle, frozen features", "A run has no log"):
        assert word in pages["run"]
    for word in ("Prompt ID", "Gradient ID", "prototype", "frozen features", "layer 3", "✓"):
        assert word in pages["explained"]
    assert "masks" not in pages["explained"]  # a task of LoRA has none
    assert "im&quot;age&lt;1&gt;.png" in pages["explained"]


def _refused(*_):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_report_replaces_itself_alone(library_, tmp_path, capsys, monkeypatch):
    html_report.write(library_)
    file = tmp_path / "mine.html"
    file.write_text("<p>my own page")
    assert main(["report", str(library_), f"--output={file}"]) == 1
    assert "is no page that soft-jax made" in capsys.readouterr().err
    assert file.read_text() == "<p>my own page"
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        html_report.write(library_, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in (("pipe", "is a named pipe"), ("loop", r"can't be written \(Too many")):
        with pytest.raises(UserError, match=message):
            html_report.write(library_, tmp_path / name)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"read \(Permission den"):
        patch.setattr(html, "open", _refused, raising=False)
        html_report.write(library_, file)
    with monkeypatch.context() as patch:  # as on a disk that can only be read
        patch.setattr(os, "access", lambda path, mode: False)
        patch.setattr(html_report, "page", None)
        patch.setattr(explain, "load", None)
        for words in (["report", str(library_)], ["explain", str(library_), "x.png"]):
            assert main([*words, f"--output={tmp_path / 'new.html'}"]) == 1
            assert "new.html can't be written" in capsys.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(html_report, "page", lambda opened: {}["page"])
        html_report.write(library_, tmp_path / "none/at/all.html")
    assert not (tmp_path / "none").exists()
    html_report.write(library_, tmp_path / "none/at/all.html")
    assert (tmp_path / "none/at/all.html").is_file()
    with pytest.raises(UserError, match=r"mine.html can't be made \(File exists\)"):
        html_report.write(library_, file / "x.html")
    with pytest.raises(UserError, match="there is none in"):
        html_report.write(tmp_path)


def test_a_damaged_version_and_a_lost_backbone_are_said(library_, tmp_path, monkeypatch):
    root = tmp_path / "library"
    shutil.copytree(library_, root)
    shutil.rmtree(root / "tasks/001/adapter")
    page = html_report.page(Library(root))
    assert f"{NAMES[1]}: {NAMES[1]}@1 is damaged" in page and "Task t2" in page
    lost = backbones.Backbone("tiny", TINY, {}, "1" * 64)
    monkeypatch.setattr(backbones, "load", lambda *_: lost)
    page = html_report.page(Library(root))
    assert "could not be compared with the frozen ones: backbone: the file found has" in page


def test_a_page_is_of_one_state(library_, tmp_path, monkeypatch):
    """Also where another command changes the library meanwhile."""
    root = tmp_path / "library"
    shutil.copytree(library_, root)
    known, read = html_report.page(Library(root)), LibraryReader.read

    def read_and_change(reader):
        state = read(reader)
        monkeypatch.setattr(LibraryReader, "read", read)
        Library(root).archive(NAMES[1])
        return state

    monkeypatch.setattr(LibraryReader, "read", read_and_change)
    page = html_report.page(Library(root))
    assert LibraryReader(root).read().version(NAMES[1]).state == "archived"
    assert "The last is that of the library now." in page
    sections = [re.search(f'(?s)<section id="{name}".*?</section>', text)[0]
                for text in (known, page) for name in ("confusion", "log")]  # fmt: skip
    assert sections[:2] == sections[2:]


def test_a_curve_is_of_one_task_whatever_it_is_called(library_, tmp_path, monkeypatch):
    root, drawn = tmp_path / "library", []
    shutil.copytree(library_, root)
    opened = Library(root)
    opened.rename(NAMES[0], "other")
    state = opened.state()
    again = {"t2": NAMES[0]}  # another task's name by now, as earlier releases let it be
    named = {
        field: {again.get(name, name): found for name, found in getattr(state, field).items()}
        for field in ("tasks", "figures")
    }
    state = dataclasses.replace(state, **named)

    def curves(title, places, series, *_, hollow):
        drawn.append((places, series, hollow))
        return html.Markup("")

    monkeypatch.setattr(html, "curves", curves)
    monkeypatch.setattr(html, "LONGEST_PLACE", 99)
    html_report._over_time(state, opened.log())
    places, series, hollow = drawn[0]
    assert places == ["other@1", f"{NAMES[1]}@1", f"{NAMES[0]}@1", "other@2", "now"]
    assert hollow == [3]
    assert list(series) == ["other", NAMES[1], NAMES[0]]
    assert series[NAMES[0]][:2] == [None, None] and None not in series["other"]
    assert [row[-1] for row in series.values()] == [state.figures[name]["given"] for name in series]
    # The state does not have them: it would grow with the square of the tasks.
    versions = [version for found in state.tasks.values() for version in found]
    assert {key for version in versions for key in version.gate} == {"fallen", "unchecked"}


def test_many_tasks_are_summarized(rng):
    """500 tasks: matrices are means over blocks, trees have few leaves, curves are three."""
    names = [f"task-{number}" for number in range(500)]
    values = np.arange(500.0)[:, None] + np.zeros(500)
    shown, blocks = html.in_blocks(names, values)
    assert blocks.shape == (24, 24) and shown[0] == "1–21" and shown[-1] == "484–500"
    assert blocks[0, 5] == 10 and blocks[-1, 0] == np.arange(483, 500).mean()
    shares = html.in_blocks(names, np.full((500, 500), 0.2), shares=True)[1]
    np.testing.assert_allclose(shares.sum(axis=1), 100)
    apart = np.abs(rng.normal(size=(500, 500)))
    tree = html.tree("Tasks", names, (apart + apart.T) / 2)
    assert tree.count("<text x=") - 1 <= html.MOST_LEAVES
    stage = {name: {"given": 50.0, "per_sample": 40.0} for name in names}
    series = html_report._series([stage, stage], "given")
    assert list(series) == ["mean of 500 tasks", "lowest", "highest"]
    page = html_report._confusion(names, apart, "Tasks")
    assert len(page) < 100_000 and "mean over its rows of the sum of its columns" in page
    assert "a cell is the mean over them." in html_report._blocks_note(names)


def test_a_page_says_what_weights_are_by_the_method():
    for method, words in (
        ("lora", "θ + 8 AB"),
        ("dualprompt+wsn", "θ ⊙ m"),
        ("adapter", ""),
    ):
        said = html_report._kind_of(tiny_config(method=method))
        assert (words in said) if words else not said


def test_numbers_and_text():
    assert html.number_of(-0.04, "{:+.1f}") == "0.0" and html.number_of(-1, "{:.0f}") == "−1"
    assert html.number_of(10, "{:.0f}") == "10" and html.number_of(0.5, "{:+.1f}") == "+0.5"
    assert html.text("<b>\x00\udcff") == "&lt;b&gt;\\x00\\udcff"
    assert html.text(html.strong("&")) == "<strong>&amp;</strong>"
    page = html.heat_map("c", ["r"], ["a", "b"], np.array([[np.nan, 1.0]]))
    assert "<td></td>" in page and ">1<" in page
