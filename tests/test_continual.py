"""The outer loop's parts that a whole run can't show by itself."""

import dataclasses
import io
import threading
from contextlib import closing

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from soft_jax import distributed, pytrees
from soft_jax.config import Config
from soft_jax.data import sources
from soft_jax.data.scenarios import equal
from soft_jax.errors import UserError
from soft_jax.experiment import loop
from soft_jax.experiment import run as run_lib
from soft_jax.experiment.bank import TaskBank
from soft_jax.hooks import Hooks
from soft_jax.inference import engine
from soft_jax.inference.predictor import Predictor
from soft_jax.methods.method import begin
from soft_jax.store.folder import Store
from soft_jax.training import loop as training_loop
from soft_jax.training import train_step
from tests.conftest import tiny_config, tiny_method


@pytest.fixture
def run(rng):
    """A run over 4 classes in 2 tasks, without backbone or method: 11 training and 6 test images
    a task.
    """
    labels = np.arange(22, dtype=np.int32) % 4
    split = sources.InMemoryImages(rng.integers(0, 256, (22, 4, 4, 3), dtype=np.uint8), labels)
    test = sources.InMemoryImages(split.images[:12], labels[:12])
    return run_lib.Run(
        config=Config(tasks=2, batch_size=4, epochs=3, dataset="digits"),
        scenario=equal(range(4), 4, 2),
        dataset=sources.Dataset(split, test, tuple("abcd")),
        backbone=None,
        params=None,
        method=None,
        rules=(),
        step_config=None,
        mesh=distributed.data_mesh(),
        store=None,
        console=Console(quiet=True),
        stop=threading.Event(),
    )


def test_a_query_is_computed_once_in_a_run(run, monkeypatch):
    calls, run = [], dataclasses.replace(run, method=tiny_method())
    monkeypatch.setattr(
        engine,
        "queries",
        lambda method, params, images, *_: calls.append(len(images)) or images.sum((1, 2)),
    )
    for _ in range(3):
        assert run.query("test", 0).shape == (6, 3)
        run.query("test", 1)
    assert calls == [6, 6]


@pytest.fixture
def small(digits, tmp_path):
    """`prepare` for the tiny world in two tasks, with batches that four devices don't divide."""
    settings = {
        "tasks": 2,
        "batch_size": 6,
        "epochs": 1,
        "eval_batch_size": 16,
        "prototype_features": 50,
    }

    def prepare(devices=4, **changes):
        with closing(Store(tmp_path / f"on{devices}")) as store:
            mesh = distributed.data_mesh(jax.devices()[:devices])
            return run_lib.prepare(
                tiny_config(**settings | changes),
                store,
                Console(quiet=True),
                threading.Event(),
                mesh,
            )

    return prepare


def run_two_tasks(run):
    """Both tasks as `loop.run` trains them: adapters and model after each task, and the rows of
    the last stage.
    """
    learned, shared, adapters, models = TaskBank(run), run.initial_shared(), [], []
    for task in range(2):
        adapter = begin(run.initial_adapter(task), learned.prompt(task - 1) if task else None)
        state, _ = loop.train_task(run, task, adapter, shared, run.initial_memory(shared))
        adapters.append(state.trainable["adapter"])
        shared = state.trainable["shared"]
        learned.add(task, adapters[-1], loop.task_statistics(run, task))
        models.append(learned.model(shared))
    return adapters, models, loop.evaluate_stage(run, models[-1], "test").rows


def test_the_same_run_on_one_and_on_four_devices(small):
    (adapters, models, rows), (adapters_4, models_4, rows_4) = (
        run_two_tasks(small(devices)) for devices in (1, 4)
    )
    ours, theirs = (
        jax.device_get((a, m[-1].shared)) for a, m in ((adapters, models), (adapters_4, models_4))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours, theirs)
    for protocol, by_task in rows.items():
        for row, row_4 in zip(by_task, rows_4[protocol], strict=True):
            assert row.total == row_4.total
            assert abs(row.correct - row_4.correct) <= 1, protocol


def test_an_old_task_keeps_its_key_and_prompt_while_a_new_one_trains(small):
    run = small()
    learned = TaskBank(run)
    learned.add(0, run.initial_adapter(0), loop.task_statistics(run, 0))
    model = learned.model(run.initial_shared())
    first = {name: np.asarray(rows[0]) for name, rows in model.rows.items()}
    state, _ = loop.train_task(
        run, 1, begin(run.initial_adapter(1), learned.prompt(0)), run.initial_shared(), {}
    )
    learned.add(1, state.trainable["adapter"], loop.task_statistics(run, 1))
    later = learned.model(state.trainable["shared"])
    for name, rows in later.rows.items():
        np.testing.assert_array_equal(rows[0], first[name])
    drawn, trained = (
        pytrees.flatten(jax.device_get(a))
        for a in (run.initial_adapter(1), state.trainable["adapter"])
    )
    assert all((trained[path] != drawn[path]).any() for path in drawn)


@pytest.mark.parametrize("held", [True, False])
def test_only_the_g_prompt_drifts(small, held):
    """With the G-prompt held after the first task, a later task changes no logit of an older
    one's classes, to the bit.
    """
    run = small(freeze_g_prompt=held)
    _, (first, second), _ = run_two_tasks(run)
    batching = run.settings.batching
    images = run.part("test", 0).images
    logits = []
    for model in (first, second):
        tokens, _ = engine.encode(model, images, batching, queried=False)
        pairs = engine.alone(np.zeros(len(images), int))
        logits.append(engine.logits(model, tokens, pairs, batching)[:, run.scenario.class_mask(0)])
    assert (logits[0] == logits[1]).all() == held
    assert (
        np.asarray(first.shared["g_prompt"]) == np.asarray(second.shared["g_prompt"])
    ).all() == held


def test_a_new_prompt_starts_as_the_old_one_and_its_key_does_not(small):
    run = small()
    first, second = run.initial_adapter(0), run.initial_adapter(1)
    begun = begin(second, first)
    np.testing.assert_array_equal(begun["prompt"], first["prompt"])
    np.testing.assert_array_equal(begun["key"], second["key"])
    assert begin(first, None) is first


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nAnd a table."),
        MemoryError("Unable to allocate 23 TiB: Out of memory"),
        MemoryError("Out of memory"),
    ],
)
def test_too_little_memory_says_what_to_do(digits, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(loop, "train_task", full)
    for above, named in (({}, "batch_size"), ({"image_size": 16}, "image_size")):
        config = Config(dataset="digits", tasks=2, method="head", **above)
        with pytest.raises(
            UserError,
            match=r"^memory: th(e devices have|is machine has) too little \(.*Out of memory\)\. "
            f"Take a lower .* in another workdir dtype=bfloat16 or a lower {named}\\. Fini",
        ):
            loop.run(config, tmp_path / named, Console(quiet=True))


def test_sigterm_saves_at_once(small):
    """Between two scheduled saves: the state of the step it stopped at is kept, and training
    goes on from there.
    """
    run = small()
    adapter, shared = run.initial_adapter(0), run.initial_shared()
    seen = []
    stopping = dataclasses.replace(
        run, log=lambda group, step, values: run.stop.set() or seen.append(step)
    )
    with pytest.raises(loop.Preempted, match="Stopped after step") as stopped:
        loop.train_task(stopping, 0, adapter, shared, {})
    done = int(str(stopped.value).split()[3])
    assert 0 < done < run.sampler(0).steps
    assert [path.name for path in run.store.training.iterdir()] == [f"000-{done:06d}"]
    run.stop.clear()
    continued = dataclasses.replace(run, log=lambda group, step, values: seen.append(step))
    state, _ = loop.train_task(continued, 0, adapter, shared, {})
    assert seen == list(range(int(state.step)))
    whole = dataclasses.replace(run, store=small(1).store)
    expected, _ = loop.train_task(whole, 0, adapter, shared, {})
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_sigterm_is_answered_while_training_images_are_looked_at(small, monkeypatch):
    """Before the next of the parts that they are looked at in, which change nothing."""
    run = small()
    whole = run.train_query(0)
    monkeypatch.setattr(run_lib, "READ_AT_ONCE", 8)
    rows = run.members(0)
    np.testing.assert_allclose(run.features(rows, run.params), whole, atol=1e-5)
    calls, ask = [], engine.queries
    monkeypatch.setattr(
        engine, "queries", lambda *a, **k: run.stop.set() or calls.append(a) or ask(*a, **k)
    )
    with pytest.raises(
        loop.Preempted, match="Stopped while looking at training images; the same command continues"
    ):
        loop.task_statistics(dataclasses.replace(run, train_queries={}), 0)
    assert len(calls) == 1


@pytest.mark.parametrize("call", [1, 3, 64])
def test_how_many_steps_a_call_runs_changes_no_bit(small, call):
    run = small(epochs=2, checkpoint_every=4)
    adapter, shared = run.initial_adapter(0), run.initial_shared()
    seen = []
    logging = dataclasses.replace(
        run,
        log=lambda group, step, values: seen.append((step, values)),
        hooks=Hooks(steps_at_once=lambda steps: call),
    )
    state, _ = loop.train_task(logging, 0, adapter, shared, {})
    step_by_step = train_step.compile_init(run.step_config, run.mesh)(adapter, shared)
    plan, split = run.sampler(0), run.dataset.train.take(run.members(0))
    fixed = {"class_mask": run.scenario.class_mask(0), "freeze_g_prompt": False, "memory": {}}
    for step in range(plan.steps):
        rows, weights = plan.batch(step)
        batch = {"images": split.images[rows], "labels": split.labels[rows], "weights": weights}
        key = train_step.stream(run.config.seed, "augment", 0)
        step_by_step, terms = train_step.compile_step(run.step_config, run.mesh)(
            step_by_step, run.params, batch | fixed, key
        )
        assert seen[step] == (step, {name: float(value) for name, value in terms.items()})
    assert len(seen) == plan.steps
    jax.tree.map(np.testing.assert_array_equal, state, step_by_step)


def test_calls_grow_to_what_takes_a_second():
    assert training_loop.next_call(1, 1, 30.0) == 1
    assert training_loop.next_call(1, 1, 0.01) == 4
    assert training_loop.next_call(16, 16, 0.5) == 32
    assert training_loop.next_call(16, 16, 4.0) == 4


@pytest.fixture
def from_files(small, monkeypatch):
    """`small`, its training and test images as files of many shapes."""
    held = sources.load()

    def as_files(split):
        contents = []
        for index, image in enumerate(split.images):
            file = io.BytesIO()
            Image.fromarray(np.pad(image, ((0, index % 5), (0, 0), (0, 0)))).save(file, "PNG")
            contents.append(file.getvalue())
        return sources.EncodedImages(
            contents.__getitem__,
            str,
            list(map(str, contents)),
            split.labels,
            np.arange(len(contents)),
        )

    monkeypatch.setattr(
        sources,
        "load",
        lambda *_: sources.Dataset(as_files(held.train), as_files(held.test), held.class_names),
    )
    return small


def test_a_run_on_files_goes_on_where_it_was(from_files):
    """Stopped within an epoch and continued: the bits of a run that was not; and the same on one
    device and on four.
    """
    run = from_files()
    adapter, shared = run.initial_adapter(0), run.initial_shared()
    stopping = dataclasses.replace(run, log=lambda group, step, values: run.stop.set())
    with pytest.raises(loop.Preempted, match="Stopped after step [1-5] of task 1"):
        loop.train_task(stopping, 0, adapter, shared, {})
    run.stop.clear()
    state, seconds = loop.train_task(run, 0, adapter, shared, {})
    assert int(state.step) == run.sampler(0).steps
    assert 0 < seconds["input_wait"] < seconds["train"]
    whole = dataclasses.replace(run, store=from_files(2).store)
    expected, _ = loop.train_task(whole, 0, adapter, shared, {})
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    one = from_files(1)
    alone, _ = loop.train_task(one, 0, one.initial_adapter(0), one.initial_shared(), {})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
        state.trainable,
        jax.device_get(alone.trainable),
    )


def test_exemplars_come_from_files_too(from_files):
    """With what a step needs of each beside image and label; on one device and on four."""
    trained = []
    for devices in (4, 1):
        run = from_files(devices, method="derpp", buffer_size=20, learning_rate=0.003)
        shared = run.initial_shared()
        memory = run.initial_memory(shared)
        for task in range(2):
            recalled, shared = run.method.before_task(memory, shared)
            state, _ = loop.train_task(run, task, {}, shared, recalled)
            memory, shared = loop.task_memory(run, task, memory, state.trainable)
        assert (np.asarray(memory["rows"]) >= 0).all()
        trained.append(jax.device_get(shared))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *trained)


def test_files_are_evaluated_as_images_in_memory(small, from_files):
    run = from_files()
    assert run.settings.prepared
    size = run.method.architecture.image_size
    images = run.part("test", 1).images
    assert images.shape[1:] == (size, size, 3)
    assert run.part("test", 1) is run.part("test", 1)
    for task in range(2):
        count = len(run.part("test", task).labels)
        assert run.query("test", task).shape == (count, run.method.architecture.dim)
        assert run.train_query(task).shape == (run.sampler(task).count, run.method.architecture.dim)
    _, _, rows = run_two_tasks(run)
    assert rows["oracle/task_given"][1].total == len(run.part("test", 1).labels)


@pytest.mark.parametrize("stored", ["memory", "files"])
def test_a_fixed_query_is_that_of_the_whole_image(request, monkeypatch, stored):
    """It is asked for once a task, for training and statistics together, and the key moves
    towards it alone.
    """
    make = request.getfixturevalue("small" if stored == "memory" else "from_files")
    calls, ask = [], engine.queries
    monkeypatch.setattr(
        engine, "queries", lambda *args, **kwargs: calls.append(1) or ask(*args, **kwargs)
    )
    run = make(cache_queries=True)
    adapter, shared = run.initial_adapter(0), run.initial_shared()
    logged = []
    logging = dataclasses.replace(
        run, log=lambda group, step, values: logged.append(values["key_similarity"])
    )
    loop.train_task(logging, 0, adapter, shared, {})
    loop.task_statistics(run, 0)
    assert len(calls) == 1
    rows, weights_ = run.sampler(0).batch(0)
    query, key = run.train_query(0)[rows[weights_ > 0]], np.asarray(adapter["key"])
    cosine = query @ key / np.linalg.norm(query, axis=1) / np.linalg.norm(key)
    assert logged[0] == pytest.approx(cosine.mean(), abs=1e-5)


def classes_file(tmp_path):
    (tmp_path / "tasks.json").write_text('[["7", 2, "0"], [5]]')
    return {"scenario": "file", "scenario_file": str(tmp_path / "tasks.json")}


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("rule", ["increments", "file"])
def test_tasks_of_any_sizes_are_learned_and_predicted(rule, digits, tmp_path):
    """With a remainder, or with classes that are in no task; continued as they began."""
    settings = {"scenario": "increments", "increment": 4, "class_order_seed": 1993}
    expected = [len(part) for part in (range(4), range(4), range(2))]
    if rule == "file":
        settings, expected = classes_file(tmp_path), [3, 1]
    config = tiny_config(
        **settings, batch_size=10, epochs=1, eval_batch_size=16, prototype_features=20
    )
    manifests = learn(config, tmp_path / "run")
    assert [len(manifest.classes) for manifest in manifests] == expected
    if rule == "file":
        assert manifests[0].classes == (7, 2, 0)
    again = learn(config, tmp_path / "run")
    assert [manifest.metrics for manifest in again] == [manifest.metrics for manifest in manifests]
    predictor = Predictor.load(tmp_path / "run", task_id="prototype", batch_size=16)
    classes, tasks, _, _ = predictor.predict(digits.test.images)
    for task, manifest in enumerate(manifests):
        own = np.isin(digits.test.labels, manifest.classes)
        row = manifests[-1].metrics["per_sample/prototype"][task]
        assert row["total"] == own.sum()
        assert row["correct"] == (classes == digits.test.labels)[own].sum()
        assert set(classes[tasks == task]) <= set(manifest.classes)
    if rule == "file":
        (tmp_path / "tasks.json").write_text('[["7", 2], [5]]')
        with pytest.raises(UserError, match="tasks: .* there, .* now"):
            learn(config, tmp_path / "run")


def learn(config, workdir):
    return loop.run(config, workdir, Console(quiet=True))


def test_what_is_held_out_is_not_trained_on(small, digits):
    run = small(validation=0.25)
    assert run.parts == ("test", "validation")
    trained, held = run.dataset.train, run.dataset.validation
    assert len(trained.labels) + len(held.labels) == len(digits.train.labels)
    taken = {image.tobytes() for image in held.images}
    whole = [image.tobytes() for image in digits.train.images]
    assert {image.tobytes() for image in trained.images} == set(whole) - taken
    rows = np.concatenate([run.training_indices(task)[0] for task in range(2)])
    assert rows.max() < len(trained.labels)


def test_a_share_that_holds_nothing_out_is_refused(small):
    with pytest.raises(UserError, match="validation: a share of 0.01 holds no training image of"):
        small(validation=0.01)


def test_what_the_first_process_says_is_finished_holds(small, monkeypatch):
    """Another that sees something else ends, or starts the task again with all of them."""
    run = small()
    adapter, shared = run.initial_adapter(0), run.initial_shared()
    stopping = dataclasses.replace(run, log=lambda group, step, values: run.stop.set())
    with pytest.raises(loop.Preempted):
        loop.train_task(stopping, 0, adapter, shared, {})
    run.stop.clear()
    monkeypatch.setattr(distributed, "from_primary", lambda *values: tuple(v + 1 for v in values))
    state = train_step.compile_init(run.step_config, run.mesh)(adapter, shared)
    continued, seconds = loop._continued(run, 0, state)
    assert (continued is state, seconds) == (True, 0.0)
    assert not list(run.store.training.glob("0*"))


def test_another_dataset_is_another_run(small, monkeypatch):
    small()
    few = sources.load()
    monkeypatch.setattr(sources, "load", lambda *_: dataclasses.replace(few, train=few.test))
    with pytest.raises(UserError, match="dataset_sha256: .* there, .* now"):
        small()


def test_a_run_that_ended_lets_go_of_its_workdir(tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="backbone_path: no file"):
            loop.run(Config(backbone_path="/nowhere"), tmp_path, Console(quiet=True))


def test_steps_are_counted_where_only_compiled_programs_can_be(small, monkeypatch):
    """As on GPUs and TPUs; and a backend that can't count leaves the figure out instead of
    ending the run.
    """
    written = small().step_flops
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    assert 0.2 * written < small().step_flops < 2 * written
    monkeypatch.setattr(jax.stages.Compiled, "cost_analysis", lambda self: None)
    assert small().step_flops is None
