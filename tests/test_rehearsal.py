"""DER++, iCaRL and BiC against their definitions, and what all of them keep and train on in a
run.
"""

import dataclasses
import threading
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from soft_jax.config import Config
from soft_jax.data import batches
from soft_jax.distributed import data_mesh
from soft_jax.errors import UserError
from soft_jax.experiment import loop, manifest
from soft_jax.experiment.run import prepare
from soft_jax.methods import hosts, regularization, rehearsal
from soft_jax.models import backbones
from soft_jax.store.folder import Store
from soft_jax.training.task_input import TaskData, TaskInput
from tests.conftest import hardly_optimized, tiny_method, tiny_world
from tests.small import SMALL, first_two_layers

pytestmark = pytest.mark.usefixtures("fast_compile")


def whole(way, backbone):
    """A method that trains the whole network of two layers, and its shared part."""
    method = tiny_method(
        architecture=SMALL,
        strategy=way,
        trains_backbone=True,
        reparametrization=None,
        host=hosts.PromptHost(),
    )
    return method, method.init_shared(jax.random.key(1), first_two_layers(backbone))


def reviewed(rng, labels, new, rows=None):
    labels = np.asarray(labels)
    rows = np.arange(len(labels)) if rows is None else np.asarray(rows)
    features, logits = rng.normal(size=(len(labels), 24)), rng.normal(size=(len(labels), 6))
    new, seen = (np.isin(np.arange(6), classes) for classes in (new, [*labels, *new]))
    return rehearsal.Reviewed(rows, labels, features, logits.astype(np.float32), new, seen)


def test_the_first_of_each_label():
    labels = np.array([3, 1, 3, 3, 1, 0])
    np.testing.assert_array_equal(rehearsal.first_of_each(labels, 2), [0, 1, 2, 4, 5])


def test_herding_takes_what_brings_the_mean_nearest(rng):
    features = rng.normal(size=(9, 4))
    chosen = []
    for _ in range(5):
        left = [i for i in range(9) if i not in chosen]
        chosen.append(
            min(
                left,
                key=lambda i: np.linalg.norm(
                    features[[*chosen, i]].mean(axis=0) - features.mean(axis=0)
                ),
            )
        )
    order = rehearsal.herding(features, 5)
    assert order[:5].tolist() == chosen
    assert sorted(order.tolist()) == list(range(9))


def test_replayed_rows_come_from_the_exemplars():
    plan = batches.BatchSampler(
        1, 2, count=7, epochs=2, batch_size=4, devices=3, replay=True, replayed=5
    )
    assert plan.padded == 9
    assert plan.steps == 4
    drawn = set()
    for step in range(plan.steps):
        rows, counted = plan.batch(step)
        own = 4 if step % 2 == 0 else 3
        assert (rows[:own] < 7).all()
        again = rows[own : 2 * own].tolist()
        assert set(again) <= set(range(7, 12))
        assert len(set(again)) == own
        assert counted.tolist() == [1] * 2 * own + [0] * (9 - 2 * own)
        drawn.add(tuple(again))
    assert len(drawn) > 1
    rows, counted = batches.BatchSampler(1, 2, 7, 2, 4, 3, replay=True).batch(
        0
    )  # there are none yet
    assert counted.tolist() == [1] * 4 + [0] * 5


def test_derpp_holds_the_logits_of_then(backbone, rng):
    way = rehearsal.DERpp(buffer_size=8, alpha=0.3)
    method, shared = whole(way, backbone)
    memory = way.init(method, shared)
    known = reviewed(rng, np.arange(40) % 2, new=[0, 1])
    memory, _ = way.update_buffer(memory, shared, known)
    assert sorted(memory["rows"].tolist()) == list(range(8))
    later = reviewed(
        rng,
        [*known.labels[:8], *(2 + np.arange(10) % 2)],
        new=[2, 3],
        rows=[*memory["rows"], *range(50, 60)],
    )
    memory, stored = way.update_buffer(memory, shared, later)
    assert stored is shared
    assert rehearsal.rows_of(memory).tolist() == [0, 1, 2, 3, 50, 51, 52, 53]
    np.testing.assert_array_equal(
        memory["logits"][:4], known.logits[:4]
    )  # not what the network makes of them now
    np.testing.assert_array_equal(memory["logits"][4:], later.logits[8:12])

    table = way.table(memory, 3)
    assert {name: column.shape for name, column in table.items()} == {
        "replayed": (11,),
        "then": (11, 6),
    }
    taken = [0, 2, 4, 10, 0]  # two new images, two exemplars, padding
    batch = {name: column[taken] for name, column in table.items()} | {
        "weights": np.float32([1, 1, 1, 1, 0])
    }
    logits = rng.normal(size=(5, 6))
    expected = (
        0.3
        / 2
        * np.mean(
            [
                np.mean((logits[2] - memory["logits"][1]) ** 2),
                np.mean((logits[3] - memory["logits"][7]) ** 2),
            ]
        )
    )
    assert way.loss(memory, method, {}, {}, batch, jnp.asarray(logits)) == pytest.approx(
        expected, rel=1e-5
    )
    batch["replayed"] = np.zeros(5, np.float32)
    assert way.loss(memory, method, {}, {}, batch, jnp.asarray(logits)) == 0


def test_icarl_classifies_by_the_nearest_mean_and_trains_its_own_classifier(backbone, rng):
    way = rehearsal.ICaRL(buffer_size=8)
    method, shared = whole(way, backbone)
    known = reviewed(rng, np.arange(30) % 4, new=[0, 1, 2, 3])
    memory, served = way.update_buffer(way.init(method, shared), shared, known)
    rows = rehearsal.rows_of(memory)
    assert np.bincount(known.labels[rows]).tolist() == [2, 2, 2, 2]
    unit = known.features / np.linalg.norm(known.features, axis=1, keepdims=True)
    for label in range(4):
        members = np.flatnonzero(known.labels == label)
        assert set(rows[known.labels[rows] == label]) == set(
            members[rehearsal.herding(unit[members], 2)[:2]]
        )
    means = np.stack([unit[rows[known.labels[rows] == label]].mean(axis=0) for label in range(4)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    queries = rng.normal(size=(50, 24)).astype(np.float32)
    nearest = np.linalg.norm(
        queries[:, None] / np.linalg.norm(queries, axis=1)[:, None, None] - means, axis=2
    ).argmin(axis=1)
    np.testing.assert_array_equal(
        np.asarray(method.head(backbone, served, queries))[:, :4].argmax(axis=1), nearest
    )
    recalled, start = way.before_task(memory, served)
    for network in (recalled["shared"], start):  # distilled from, and trained on
        np.testing.assert_array_equal(network["head"]["kernel"], shared["head"]["kernel"])
    assert memory["seen"].tolist() == [True] * 4 + [False] * 2


def test_a_class_without_images(backbone, rng):
    """Of four new classes one has none: it is counted among those seen, has no exemplars, and
    iCaRL never names it.
    """
    method, shared = whole(way := rehearsal.ICaRL(buffer_size=8), backbone)
    known = reviewed(rng, [0, 1, 3] * 10, new=[0, 1, 2, 3])
    memory, served = way.update_buffer(way.init(method, shared), shared, known)
    assert np.bincount(known.labels[rehearsal.rows_of(memory)]).tolist() == [2, 2, 0, 2]
    logits = np.asarray(method.head(backbone, served, rng.normal(size=(50, 24)).astype(np.float32)))
    assert (logits[:, [2, 4, 5]] == -np.inf).all()
    assert np.isfinite(logits[:, [0, 1, 3]]).all()
    method, shared = whole(way := rehearsal.DERpp(buffer_size=8), backbone)
    considered = way.candidate_indices(known.rows, known.labels, known.seen)
    memory, _ = way.update_buffer(way.init(method, shared), shared, known)
    assert sorted(rehearsal.rows_of(memory)) == sorted(considered)


def test_bic_finds_the_bias_and_corrects_the_classifier_with_it(backbone, rng):
    """Logits whose labels are drawn by their own softmax, those of new classes then made too
    high: α and β undo it.
    """
    way = rehearsal.BiC(buffer_size=30000)
    method, shared = whole(way, backbone)
    true = 2 * rng.normal(size=(30000, 6))
    p = np.exp(true) / np.exp(true).sum(axis=1, keepdims=True)
    labels = (p.cumsum(axis=1) > rng.random((30000, 1))).argmax(axis=1)
    new = np.isin(np.arange(6), [4, 5])
    high = np.where(new, (true + 1.5) / 0.6, true)
    known = rehearsal.Reviewed(
        np.arange(30000), labels, np.zeros((30000, 24)), high, new, seen=np.ones(6, bool)
    )
    alpha, beta = rehearsal.bias(known, np.arange(30000))
    assert (alpha, beta) == (pytest.approx(0.6, abs=0.05), pytest.approx(-1.5, abs=0.1))
    few = np.flatnonzero(labels >= 4)[:2]  # of which any α is the better, the larger it is
    assert abs(rehearsal.bias(known, few)[0]) < 3

    memory = way.init(method, shared) | {"seen": ~new}
    memory, served = way.update_buffer(memory, shared, known)
    features = rng.normal(size=(7, 24)).astype(np.float32)
    before, after = (np.asarray(method.head(backbone, part, features)) for part in (shared, served))
    np.testing.assert_allclose(after[:, :4], before[:, :4], rtol=1e-6)
    validation = rehearsal.all_rows_of({"rows": memory["validation"]})
    alpha, beta = rehearsal.bias(known, validation)
    np.testing.assert_allclose(after[:, 4:], alpha * before[:, 4:] + beta, rtol=1e-4, atol=1e-5)
    recalled, start = way.before_task(memory, served)
    np.testing.assert_array_equal(start["head"]["kernel"], shared["head"]["kernel"])
    np.testing.assert_array_equal(recalled["shared"]["head"]["kernel"], served["head"]["kernel"])


def test_bics_distillation_weighs_as_many_old_classes_as_there_are(backbone, rng):
    way, plain = rehearsal.BiC(buffer_size=12), regularization.LwF()
    method, shared = whole(way, backbone)
    seen = np.arange(6) < 4
    memory, _ = way.before_task(way.init(method, shared) | {"seen": jnp.asarray(seen)}, shared)
    batch = {
        "images": rng.random((3, 16, 16, 3), np.float32),
        "weights": np.ones(3, np.float32),
        "class_mask": np.arange(6) < 5,
    }
    logits = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    arguments = (memory, method, {"adapter": {}, "shared": shared}, backbone, batch, logits)
    ours, theirs = (jax.jit(x.loss, static_argnums=1)(*arguments) for x in (way, plain))
    assert ours == pytest.approx(4 * float(theirs) / 2**2, rel=1e-5)  # 4 old, 1 new; no T²


def test_what_bic_holds_out_is_little():
    """A tenth of a class's exemplars, or of its images, from the front; one at least, but never
    all of a class.
    """
    labels = np.repeat([2, 0, 1, 3], [40, 500, 3, 1])
    rows = 1000 + np.arange(len(labels))
    held = rehearsal.BiC(buffer_size=1000).held_out(rows, labels, np.arange(6) < 5)
    assert {
        label: rows[labels == label].tolist()[:count] for label, count in ((2, 4), (0, 20), (1, 1))
    } == {
        label: [row for row in held.tolist() if labels[row - 1000] == label] for label in (2, 0, 1)
    }
    assert len(held) == 25


@pytest.mark.parametrize("way", [rehearsal.DERpp(buffer_size=13), rehearsal.BiC(buffer_size=41)])
def test_images_that_are_not_considered_would_change_nothing(way, backbone, rng):
    method, shared = whole(way, backbone)
    labels = np.repeat([0, 1, 2], [30, 3, 50])
    seen, rows = np.arange(6) < 3, 100 + rng.permutation(83)
    considered = np.isin(rows, way.candidate_indices(rows, labels[rows - 100], seen))
    assert considered.sum() == way.share(seen) + 3 + way.share(seen)
    known = reviewed(rng, labels[rows - 100], new=[0, 1, 2], rows=rows)
    parts = [
        dataclasses.replace(
            known,
            **{f: getattr(known, f)[considered] for f in ("rows", "labels", "features", "logits")},
        ),
        known,
    ]
    from_some, from_all = (
        way.update_buffer(way.init(method, shared), shared, part) for part in parts
    )
    jax.tree.map(np.testing.assert_array_equal, from_some, from_all)


@pytest.mark.parametrize(("method", "exemplars", "least"), [("icarl", 9, 10), ("bic", 19, 20)])
def test_too_few_exemplars_are_refused(method, exemplars, least, digits, tmp_path):
    config = Config(dataset="digits", tasks=2, method=method, buffer_size=exemplars)
    with pytest.raises(
        UserError,
        match=f"buffer_size: {exemplars} is below {least}, {least // 10} for each of 10 classes",
    ):
        loop.run(config, tmp_path, Console(quiet=True))


@dataclasses.dataclass
class Learned:
    """What one task of a run was trained on, and what was kept after it."""

    own: np.ndarray  # rows of the training set
    again: np.ndarray
    members: np.ndarray  # the task's images
    recalled: dict  # the memory after the tasks before
    data: TaskData
    pool: dict
    kept: dict  # the memory after it

    @property
    def rows(self):
        return np.concatenate([self.own, self.again])

    @property
    def drawn(self):
        """The rows of all steps, counted as in the pool."""
        sampler = self.data.sampler
        steps = map(sampler.batch, range(sampler.steps))
        return np.concatenate([rows[weights > 0] for rows, weights in steps])


@pytest.fixture(scope="module", params=["derpp", "icarl", "bic"])
def learned(request, backbone, tmp_path_factory):
    """A run of two tasks with 30 exemplars: its method's name, the run, and both tasks."""
    config = Config(
        dataset="digits",
        tasks=2,
        method=request.param,
        buffer_size=30,
        epochs=1,
        batch_size=16,
        learning_rate=0.003,
    )
    folder, mesh, tasks = tmp_path_factory.mktemp("run"), data_mesh(jax.devices()[:1]), []
    with (
        pytest.MonkeyPatch.context() as patch,
        tiny_world(backbone, patch),
        closing(Store(folder)) as store,
        hardly_optimized(),
    ):
        small = backbones.Backbone("small", SMALL, first_two_layers(backbone), "0" * 64)
        patch.setattr(backbones, "load", lambda *_: small)
        run = prepare(config, store, Console(quiet=True), threading.Event(), mesh=mesh)
        shared = run.initial_shared()
        memory = run.initial_memory(shared)
        for task in range(2):
            own, again = run.training_indices(task, memory)
            recalled, shared = run.method.before_task(memory, shared)
            data, before = run.task_data(task, recalled), memory
            pool = TaskInput(data, run.step_config, run.mesh, run.params, 0).pool
            state, _ = loop.train_task(run, task, {}, shared, recalled)
            memory, shared = loop.task_memory(run, task, memory, state.trainable)
            members = run.members(task)
            kept = jax.tree.map(np.asarray, (before, pool, memory))
            tasks.append(Learned(own, again, members, kept[0], data, kept[1], kept[2]))
    return request.param, run, tasks


def test_a_task_is_trained_on_its_own_images_and_on_older_exemplars(learned):
    method, run, tasks = learned
    labels = run.dataset.train.labels
    for task, one in enumerate(tasks):
        assert (labels[one.own] // 5 == task).all()
        assert (labels[one.again] < 5 * task).all()
        assert one.again.tolist() == rehearsal.rows_of(one.recalled).tolist()
        np.testing.assert_array_equal(one.data.class_mask, np.arange(10) < 5 * (task + 1))
    assert [len(one.again) for one in tasks] == [0, 25 if method == "bic" else 30]


def test_the_pool_on_the_devices_holds_a_tasks_images_then_exemplars(learned):
    method, run, tasks = learned
    train = run.dataset.train
    for one in tasks:
        count = len(one.rows)
        np.testing.assert_array_equal(one.pool["labels"][:count], train.labels[one.rows])
        np.testing.assert_array_equal(one.pool["images"][:count], train.images[one.rows])
        if method == "derpp":
            replayed = [0] * len(one.own) + [1] * len(one.again)
            np.testing.assert_array_equal(one.pool["replayed"][:count], replayed)
            then = one.pool["then"][len(one.own) : count]
            np.testing.assert_array_equal(then, one.recalled["logits"][: len(one.again)])


def test_an_epoch_draws_what_it_should(learned):
    """Every row once; with DER++ as many exemplars as new images in each batch, whichever."""
    method, _, tasks = learned
    for task, one in enumerate(tasks):
        if method == "derpp":
            counts = np.bincount(one.drawn < len(one.own), minlength=2).tolist()
            assert counts == [len(one.own) * (task > 0), len(one.own)]
        else:
            assert sorted(one.drawn.tolist()) == list(range(len(one.rows)))


def test_exemplars_are_equally_many_of_every_class(learned):
    method, run, tasks = learned
    kept = rehearsal.rows_of(tasks[-1].kept)
    each = 2 if method == "bic" else 3
    assert np.bincount(run.dataset.train.labels[kept], minlength=10).tolist() == [each] * 10
    assert len(set(kept.tolist())) == len(kept)
    everything = rehearsal.all_rows_of(tasks[-1].kept)
    stored = manifest._exemplar_bytes(run, tasks[-1].kept)
    assert stored == len(everything) * run.dataset.train.images[0].nbytes


def test_what_is_held_out_is_never_trained_on(learned):
    """BiC holds out one image of each class here, which it keeps; the others none."""
    method, _, tasks = learned
    held = {row for one in tasks for row in set(one.members) - set(one.own)}
    assert len(held) == (10 if method == "bic" else 0)
    assert not held & {row for one in tasks for row in one.rows}
    if method == "bic":
        kept = tasks[-1].kept
        assert set(rehearsal.all_rows_of(kept)) == held | set(rehearsal.rows_of(kept))
