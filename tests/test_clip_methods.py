"""CLIP's methods: what a task trains, what stays as it is, and who names the task."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soft_jax import distributed, pytrees
from soft_jax.errors import UserError
from soft_jax.experiment import run as run_lib
from soft_jax.inference import centres, engine, identity, rules, zero_shot
from soft_jax.methods.clip_hosts import SharedImagePrompt
from soft_jax.methods.regularization import PGP
from soft_jax.models import tokenizer
from soft_jax.training import train_step
from soft_jax.training.train_step import Rates, StepConfig
from tests.small_clip import NAMES, ONE, SMALL, small_config, small_method, small_params

pytestmark = pytest.mark.usefixtures("fast_compile")

OLD = np.arange(6) < 3  # the first task's classes
SHARED = {"head": {"text": np.zeros((6, 10), np.float32)}}  # clipprompt's, before the first task


@pytest.fixture(autouse=True)
def _optax_promotes():
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an int
        yield


@pytest.fixture(scope="module")
def params():
    return small_params()


@pytest.fixture(scope="module")
def one_layer():
    return small_params(ONE)


@pytest.fixture
def images(rng):
    return rng.random((4, 8, 8, 3), np.float32)


def of(task):
    """Bool [classes], the classes of task 0 or 1."""
    return OLD if task == 0 else ~OLD


def draw(method, params, task=0):
    """An adapter as a task's training leaves it: nowhere as it was drawn."""
    rng = np.random.default_rng(task)
    adapter = jax.device_get(initial(method, params, task)[0])
    return jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(x.dtype), adapter)


@functools.partial(jax.jit, static_argnums=0)
def logits(method, params, adapter, shared, images):
    return method.logits(params, adapter, shared, method.trunk(params, shared, images))


@functools.partial(jax.jit, static_argnums=0)
def made(method, *arguments):
    return method.with_own_classes(*arguments)


@functools.partial(jax.jit, static_argnums=0)
def initial(method, params, seed=0):
    """Adapter and shared part as they are drawn."""
    key = jax.random.key(seed)
    return method.init_adapter(key, params), method.init_shared(key, params)


encode_text = jax.jit(SMALL.encode_text)
gradients = jax.jit(train_step.gradients, static_argnames="step_config")


def shapes(tree):
    return {path: leaf.shape for path, leaf in pytrees.flatten(tree).items()}


VISION = {
    "mask/vision/blocks_1/attn/qkv/kernel": (12, 36),
    "mask/vision/blocks_1/attn/proj/kernel": (12, 12),
}
TEXT = {
    "mask/text/blocks_0/attn/qkv/kernel": (8, 24),
    "mask/text/blocks_0/attn/proj/kernel": (8, 8),
}
HEAD = {"head/text": (6, 10)}
TASK = {"key": (10,), "prompt": (5, 12), "context": (3, 16, 8)}


@pytest.mark.parametrize(
    ("method", "settings", "adapter", "shared"),
    [
        ("clip", {}, {"context": (3, 16, 8)}, HEAD | {"image_prompt": (5, 12)}),
        (
            "clip",
            {"text_context": "task", "text_context_length": 4, "image_prompt_length": 7},
            {"context": (1, 4, 8)},
            HEAD | {"image_prompt": (7, 12)},
        ),
        ("clipprompt", {}, TASK, HEAD),
        ("clipprompt", {"text_context": "task"}, TASK | {"context": (1, 16, 8)}, HEAD),
        ("clipprompt+softtf", {}, TASK | VISION, HEAD),
        ("clipprompt+softtf", {"mask_towers": "text"}, TASK | TEXT, HEAD),
        ("clipprompt+softtf", {"mask_towers": "vision+text"}, TASK | VISION | TEXT, HEAD),
        ("clip+pgp", {}, {"context": (3, 16, 8)}, HEAD | {"image_prompt": (5, 12)}),
        (
            "clip+softtf",
            {"mask_towers": "text"},
            {"key": (10,), "context": (3, 16, 8)} | TEXT,
            HEAD | {"image_prompt": (5, 12)},
        ),
    ],
)
def test_literal_trees(params, method, settings, adapter, shared):
    method = small_method(method, **settings)
    drawn = method.init_adapter, method.init_shared
    found = [jax.eval_shape(function, jax.random.key(0), params) for function in drawn]
    assert [shapes(tree) for tree in found] == [adapter, shared]
    assert {leaf.dtype for tree in found for leaf in jax.tree.leaves(tree)} == {np.dtype("float32")}
    rows = {name: shape for name, shape in method.row_shapes.items() if name in adapter}
    assert rows == {name: adapter[name] for name in rows}


def test_initial_values(params):
    """Contexts N(0, 0.02²), image prompts U(±1/√dim), and no text feature yet."""
    clip = dataclasses.replace(SMALL, dim=768, heads=12, text_dim=512, text_heads=8)
    method = small_method("clipprompt", clip)
    adapter, shared = initial(method, params)
    assert 0.0195 < adapter["context"].std() < 0.0205
    assert 0.03 < np.abs(adapter["prompt"]).max() <= 1 / np.sqrt(768)
    assert np.abs(adapter["context"][0] - adapter["context"][1]).max() > 0.02
    assert not shared["head"]["text"].any()


@pytest.mark.parametrize(
    ("reparametrization", "key"), [("softtf", "mask"), ("lora", "lora"), ("adapter", "bottleneck")]
)
@pytest.mark.parametrize("towers", ["vision", "text", "vision+text"])
def test_a_task_that_changes_no_weight_has_the_frozen_towers_to_the_bit(
    params, images, reparametrization, key, towers
):
    """Masks of ones, LoRA as it begins; a bottleneck adds 0."""
    method = small_method(f"clipprompt+{reparametrization}", mask_towers=towers, rank=2)
    adapter, shared = initial(method, params)
    if key == "mask":
        adapter["mask"] = jax.tree.map(jnp.ones_like, adapter["mask"])
    weights = pytrees.flatten(jax.jit(method.weights)(params, adapter))
    frozen = pytrees.flatten(params)
    assert {path.split("/")[0] for path in weights} == set(towers.split("+"))
    for path, kernel in weights.items():
        if key == "bottleneck":
            assert path not in frozen
        else:
            np.testing.assert_array_equal(kernel, frozen[path])
    if key == "bottleneck" and towers == "vision+text":
        answers = []
        for one in (method, small_method("clipprompt")):
            own = made(one, params, adapter, shared, OLD)
            answers.append(logits(one, params, adapter, own, images)[:, OLD])
        np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("towers", ["vision", "text"])
def test_masks_change_their_own_towers_features_alone(params, images, towers):
    method = small_method(mask_towers=towers)
    plain = small_method("clipprompt")
    adapter, shared = draw(method, params), SHARED
    by_text = np.random.default_rng(1).normal(size=(6, 10)).astype(np.float32)
    texts, answers = [], []
    for one in (method, plain):
        texts.append(made(one, params, adapter, shared, OLD)["head"]["text"][:3])
        answers.append(logits(one, params, adapter, {"head": {"text": by_text}}, images))
    for kind, (ours, theirs) in (("text", texts), ("vision", answers)):
        assert (np.abs(ours - theirs).max() > 1e-3) == (kind == towers)


def test_a_class_is_told_by_its_contexts_its_name_and_a_full_stop(params):
    method = small_method("clipprompt")
    adapter, shared = draw(method, params), SHARED
    rows = made(method, params, adapter, shared, OLD)["head"]["text"]
    for class_, text in enumerate(("cat.", "green sea turtle.", "apple.")):
        ids = tokenizer.tokenize([text])[:, :-16]
        ids = np.concatenate([ids[:, :1], np.ones((1, 16), np.int32), ids[:, 1:]], axis=1)
        direct = encode_text(params, ids, adapter["context"][class_][None])[0]
        np.testing.assert_allclose(rows[class_], direct, atol=1e-5)
    assert not rows[3:].any()


@pytest.mark.parametrize("by", ["class", "task"])
def test_a_class_has_the_contexts_of_its_own_task_alone(params, by):
    method = small_method("clipprompt", text_context=by)
    adapter, shared = draw(method, params), SHARED
    first = made(method, params, adapter, shared, OLD)
    both = made(method, params, draw(method, params, 1), first, ~OLD)["head"]["text"]
    np.testing.assert_array_equal(both[:3], first["head"]["text"][:3])
    assert np.abs(both[3:]).min(axis=1).all()
    other = adapter | {"context": adapter["context"].copy()}
    other["context"][0] *= -1
    moved = made(method, params, other, shared, OLD)["head"]["text"][:3]
    moved = np.abs(moved - first["head"]["text"][:3]).max(axis=1) > 1e-3
    assert moved.tolist() == ([True, False, False] if by == "class" else [True] * 3)


def test_tasks_of_different_sizes(params):
    """A task of fewer classes than the largest: the contexts behind its own touch nothing."""
    method, larger = small_method("clipprompt"), small_method("clipprompt", at_once=5)
    adapter, shared = draw(larger, params), SHARED
    few = np.array([0, 1, 0, 0, 1, 0], bool)
    assert larger.classes_of(few).tolist() == [1, 4, 6, 6, 6]
    rows = made(larger, params, adapter, shared, few)["head"]["text"]
    assert (np.abs(rows).max(axis=1) > 0).tolist() == few.tolist()
    own = adapter | {"context": adapter["context"][:3]}
    fewer = made(method, params, own, shared, few)["head"]["text"]
    np.testing.assert_allclose(rows, fewer, atol=1e-6)
    other = adapter | {"context": adapter["context"].copy()}
    other["context"][2:] *= -1
    np.testing.assert_array_equal(rows, made(larger, params, other, shared, few)["head"]["text"])


def test_other_classes_names_change_nothing(params, images):
    """However long they are: what stands behind a text's end is padding."""
    answers = []
    for last in ("7", "a very long name of some animal that swims"):
        method = small_method("clipprompt", names=(*NAMES[:5], last))
        adapter = draw(method, params)
        own = made(method, params, adapter, SHARED, OLD)
        answers.append(logits(method, params, adapter, own, images)[:, :3])
        alone = logits(method, params, adapter, own, images[2:3])[:, :3]
        np.testing.assert_allclose(answers[-1][2:3], alone, atol=1e-5)
    np.testing.assert_allclose(*answers, atol=1e-5)
    assert np.ptp(answers[0], axis=1).min() > 0.1


# Training.


def step_config(method, **settings):
    return StepConfig(method, **{"learning_rate": 0.05} | settings)


def batch(rng, task, memory=(), rates=None):
    """Eight images of a task, uint8, the last of no weight."""
    values = {
        "images": rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8),
        "labels": rng.integers(0, 3, 8) + 3 * task,
        "weights": (np.arange(8) < 7).astype(np.float32),
        "class_mask": of(task),
        "freeze_g_prompt": np.False_,
        "memory": dict(memory),
    }
    return values | ({} if rates is None else {"rates": rates})


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("clip", {"optimizer": "sgd", "scheduled": True}),
        ("clipprompt+softtf", {"optimizer": "adam"}),
    ],
)
def test_what_old_tasks_learned_stays_to_the_bit(one_layer, rng, method, settings):
    """Through a later task's steps, with weight decay too: the old classes' text features, and the
    logits of an old task that shares nothing else.
    """
    method, params = (
        small_method(method, ONE, mask_towers="vision+text", mask_layers=(1,)),
        one_layer,
    )
    config = step_config(method, **settings)
    step = jax.jit(train_step.train_step, static_argnames="step_config")
    rates = Rates(np.float32(0.05), np.float32(0.1), np.int32(0), np.int32(1))
    rates = rates if config.scheduled else None
    images = rng.random((4, 8, 8, 3), np.float32)
    shared, adapters, answers, texts = initial(method, params)[1], [], [], []
    for task in range(2):
        start = draw(method, params, task)
        state = train_step.init_state(config, start, shared)
        for _ in range(3):
            one = batch(rng, task, rates=rates)
            state, terms = step(state, params, one, jax.random.key(0), step_config=config)
            assert np.isfinite(list(terms.values())).all()
        moved = jax.tree.map(
            lambda new, old: np.abs(new - old).max() > 1e-4, state.trainable["adapter"], start
        )
        assert all(jax.tree.leaves(moved)), moved
        trained = state.trainable["shared"]
        adapters.append(state.trainable["adapter"])
        shared = made(method, params, adapters[-1], trained, of(task))
        texts.append(np.asarray(shared["head"]["text"]))
        answers.append(logits(method, params, adapters[0], shared, images)[:, :3])
        # The rows of the steps themselves are no others.
        np.testing.assert_array_equal(trained["head"]["text"][~of(task)], texts[-1][~of(task)])
    np.testing.assert_array_equal(texts[0][:3], texts[1][:3])
    assert np.abs(texts[1]).max(axis=1).all()
    if method.by_task:
        np.testing.assert_array_equal(*answers)
    else:
        assert np.abs(answers[0] - answers[1]).max() > 1e-4  # by the image prompt of all tasks


@pytest.mark.parametrize(("name", "part"), [("clip+pgp", "shared"), ("clipprompt+pgp", "adapter")])
def test_image_prompts_move_at_right_angles_to_old_images(one_layer, rng, name, part):
    method, params = small_method(name, ONE), one_layer
    assert isinstance(method.strategy, PGP)
    prompt = "image_prompt" if part == "shared" else "prompt"
    shared = initial(method, params)[1]
    trainable = {"adapter": draw(method, params), "shared": shared}
    old = batch(rng, 0)
    memory = method.init_memory(shared)
    assert memory["projector"].shape == (1, 12, 12)
    seen = {**old, "images": old["images"].astype(np.float32) / 255}
    learned = method.strategy.update(memory, method, trainable, params, seen)
    projector = np.asarray(learned["projector"][0])
    # An orthogonal projection, on at least half of what the embedded images are.
    np.testing.assert_allclose(projector @ projector, projector, atol=1e-5)
    tokens = np.asarray(jax.jit(ONE.embed)(params, seen["images"])).reshape(-1, 12)
    assert 0.5 <= np.square(tokens @ projector).sum() / np.square(tokens).sum() < 1
    found = []
    for kept in (memory, learned):
        new = batch(np.random.default_rng(5), 1, kept)
        new["images"] = new["images"].astype(np.float32) / 255
        grads, _ = gradients(trainable, params, new, step_config=step_config(method))
        found.append(grads)
    free, held = (grads[part][prompt] for grads in found)
    scale = np.abs(free).max()
    assert np.abs(free @ projector).max() > 0.1 * scale
    assert np.abs(held @ projector).max() < 1e-5 * scale
    np.testing.assert_allclose(held, free - free @ projector, atol=1e-6 * scale)
    context = [grads["adapter"]["context"] for grads in found]
    np.testing.assert_array_equal(*context)


def test_rates_fall_by_half_a_cosine_epoch_by_epoch():
    """As PyTorch's CosineAnnealingLR, stepped after each of 4 epochs of 3 steps."""
    rates = Rates(np.float32(0.8), np.float32(0), np.int32(4), np.int32(3))
    ours = jax.vmap(rates.at)(jnp.arange(12))
    by_epoch = [0.8, 0.4 * (1 + np.sqrt(0.5)), 0.4, 0.4 * (1 - np.sqrt(0.5))]
    np.testing.assert_allclose(ours, np.repeat(by_epoch, 3), rtol=1e-6)
    constant = rates._replace(epochs=np.int32(0))
    assert set(np.asarray(jax.vmap(constant.at)(jnp.arange(12))).tolist()) == {np.float32(0.8)}


def test_the_first_task_may_have_its_own_rate_and_decay():
    config = small_config(
        "clip",
        optimizer="sgd",
        schedule="cosine",
        epochs=5,
        batch_size=32,
        learning_rate=0.08,
        first_learning_rate=0.008,
        weight_decay=2e-4,
        first_weight_decay=5e-4,
    )
    first, second = (run_lib._rates(config, task, 7) for task in range(2))
    np.testing.assert_allclose(first, (0.001, 5e-4, 5, 7), rtol=1e-6)
    np.testing.assert_allclose(second, (0.01, 2e-4, 5, 7), rtol=1e-6)
    none = dataclasses.replace(config, first_weight_decay=0.0)
    assert run_lib._rates(none, 0, 7).weight_decay == 0
    same = dataclasses.replace(config, first_learning_rate=0.0, first_weight_decay=-1.0)
    assert run_lib._rates(same, 0, 7) == run_lib._rates(same, 1, 7)
    assert run_lib._rates(dataclasses.replace(same, schedule="constant"), 0, 7).epochs == 0


@pytest.mark.parametrize(
    ("settings", "scheduled"),
    [
        ({}, False),
        ({"optimizer": "sgd"}, True),
        ({"schedule": "cosine"}, True),
        ({"weight_decay": 0.1}, True),
        ({"first_learning_rate": 0.1}, True),
        ({"first_weight_decay": 0.1}, True),
    ],
)
def test_rates_come_with_a_task_where_they_may_change(settings, scheduled):
    config = small_config("clip", **settings)
    assert run_lib.step_config_of(config, small_method("clip"), True).scheduled == scheduled


# Who names the task.


@pytest.mark.parametrize(
    ("reparametrization", "towers"), [("softtf", "text"), ("lora", "vision+text")]
)
def test_alpha_gradients_are_those_over_explicit_alpha(reparametrization, towers):
    """In float64 against jax.grad through Σ α_t θ_t, in the images' and in the texts' encoder."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        clip = dataclasses.replace(SMALL, dtype="float64")
        names = ("cat", "sea turtle", "apple", "dog", "rose", "fish", "bee")
        method = small_method(
            f"clipprompt+{reparametrization}",
            clip,
            names,
            mask_towers=towers,
            text_context_length=3,
        )
        params = jax.tree.map(lambda x: np.asarray(x, float), small_params())
        adapters = [
            jax.tree.map(lambda x: np.asarray(x, float), draw(method, params, task))
            for task in range(3)
        ]
        # Unequal tasks; the last class is in none.
        task_of_class = np.array([0, 2, 1, 0, 1, 0, -1])
        rows = {name: np.stack([a[name] for a in adapters]) for name in method.row_shapes}
        shared = {"head": {"text": np.full((7, 10), np.nan)}}  # not what is asked here
        batching = engine.Batching(distributed.data_mesh(jax.devices()[:1]), 4)
        model = engine.Model(
            method=method,
            backbone=params,
            shared=shared,
            rows=jax.tree.map(jnp.asarray, rows),
            weights=engine.TaskWeights(method, params, lambda task: adapters[task], 2**20),
            tasks=(0, 1, 2),
            task_of_class=task_of_class,
        )
        tokens = jax.jit(method.trunk)(params, shared, rng.random((3, 8, 8, 3)))
        prompt_of = np.array([2, 0, 1])
        held = engine.Tokens(tokens, np.arange(3))
        ours = engine.alpha_gradients(model, held, engine.alone(prompt_of), batching)
        assert ours.dtype == np.float64

        by_task = [jax.jit(method.weights)(params, adapter) for adapter in adapters]
        ids, contexts = clip.tokenize([f"{name}." for name in names], 3), np.zeros((7, 3, 8))
        for task, adapter in enumerate(adapters):
            own = task_of_class == task
            contexts[own] = adapter["context"][: own.sum()]

        def entropy(alpha, tokens, prompt):
            own = jax.tree.map(
                lambda *w: sum(a * x for a, x in zip(alpha, w, strict=True)), *by_task
            )
            merged = pytrees.merge(params, own)
            text = clip.encode_text(merged, ids, contexts) * (task_of_class >= 0)[:, None]
            prefix = method.host.task_prefix({"prompt": prompt}, None)
            scores = method.classify(merged, prefix, {"head": {"text": text}}, tokens)
            return identity.entropy_of_top(scores, 7 // 3).sum()

        over_alpha, uniform = jax.jit(jax.grad(entropy)), jnp.full(3, 1 / 3)
        expected = np.stack(
            [
                over_alpha(uniform, image[None], rows["prompt"][prompt])
                for image, prompt in zip(tokens, prompt_of, strict=True)
            ]
        )
        np.testing.assert_allclose(ours, expected, atol=1e-11 * np.abs(expected).max())
    assert np.ptp(expected, axis=1).min() > 1e-4  # tasks differ, so the comparison says something


def normalized(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_zero_shot_is_the_mean_over_templates(params, rng):
    """The names alone, with spaces for underscores; each text's feature has norm 1."""
    found = zero_shot.text_features(SMALL, params, NAMES)
    expected = []
    for name in ("cat", "green sea turtle", "apple", "dog", "rose", "aquarium fish"):
        ids = tokenizer.tokenize([template.format(name) for template in tokenizer.TEMPLATES])
        features = normalized(np.asarray(encode_text(params, ids)))
        expected.append(normalized(features.mean(axis=0)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    query = rng.normal(size=(5, 10)).astype(np.float32)
    scores = np.exp(2) * normalized(query) @ np.stack(expected).T
    ours = zero_shot.logits(SMALL, params, found, query)
    np.testing.assert_allclose(ours, scores, atol=1e-4)


def test_centres_are_those_of_clusters_on_the_sphere():
    """Five clusters of directions, whatever the features' length; the L1 distance decides."""
    directions = np.eye(5, 6, dtype=np.float32)
    lengths = np.repeat([1.0, 3.0, 0.5], 5)[:, None].astype(np.float32)
    found = centres.statistics(np.tile(directions, (3, 1)) * lengths)["centres"]
    assert found.shape == (5, 6)
    order = found.argmax(axis=1)
    assert sorted(order) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(found, directions[order], atol=1e-6)
    one = centres.statistics(directions[:1])["centres"]
    np.testing.assert_array_equal(one, np.tile(directions[:1], (5, 1)))


def test_the_nearest_centre_is_so_in_the_l1_distance():
    """Of (1, 0, 0): (.5, 0, 0) is nearer by L1, (.8, .4, .4) / its norm by L2."""
    near_by_l1, near_by_l2 = np.float32([0.4, 0, 0]), np.float32([0.8, 0.25, 0.25])
    query = np.float32([[7, 0, 0]])
    assert np.linalg.norm([0.2, 0.25, 0.25]) < 0.6 < np.abs([0.2, 0.25, 0.25]).sum()
    tasks = np.stack([np.tile(near_by_l2, (5, 1)), np.tile(near_by_l1, (5, 1))])
    assert centres.distances(query, tasks).argmin(axis=1).tolist() == [1]
    tasks[0, 3] = [0.9, 0, 0]  # any of a task's centres will do
    assert centres.distances(query, tasks).argmin(axis=1).tolist() == [0]


def test_k_means_names_the_task_and_its_classes_alone_win():
    task_of_class = np.array([0, 0, 3, 3])
    found = np.stack([np.tile(row, (5, 1)) for row in np.eye(2, dtype=np.float32)])
    model = SimpleNamespace(tasks=(0, 3), task_of_class=task_of_class, solved={"k_means": found})
    batch = SimpleNamespace(model=model, query=np.float32([[2, 0.1], [0.1, 3]]))
    rule = rules.KMeans(dim=2)
    tasks = rule.identify(batch)
    assert tasks.tolist() == [0, 3]
    scores = rule.scores(batch, np.float32([[1, 2, 9, 9], [9, 9, 2, 1]]), tasks)
    assert scores.argmax(axis=1).tolist() == [1, 2]


def test_the_published_cut_off():
    """Batches over two tasks: classes up to the task of a batch's last image can win, and none
    that no task has learned.
    """
    task_of_class = np.array([0, 0, 1, 1, -1])
    model = SimpleNamespace(tasks=(0, 1), task_of_class=task_of_class)
    batch = SimpleNamespace(model=model, count=3, last_in_batch=np.array([0, 1, 1]))
    given = np.tile(np.float32([0, 1, 3, 2, 9]), (3, 1))
    rule = rules.CutOff()
    scores = rule.scores(batch, given, np.zeros(3, int))
    assert np.isfinite(scores).tolist() == [
        [True, True, False, False, False],
        [True, True, True, True, False],
        [True, True, True, True, False],
    ]
    assert rule.final_tasks(batch, scores, np.zeros(3, int)).tolist() == [0, 1, 1]
    assert rule.by_batch


@pytest.mark.parametrize(
    ("method", "rule_names"),
    [
        ("clip", {"no_task_id", "zero_shot", "cut_off"}),
        ("clip+pgp", {"no_task_id", "zero_shot", "cut_off"}),
        ("clipprompt", {"prompt_id", "zero_shot", "k_means"}),
        (
            "clipprompt+softtf",
            {"prompt_id", "gradient_id", "gradient_id_7", "zero_shot", "k_means"},
        ),
        ("clipprompt+adapter", {"prompt_id", "zero_shot", "k_means"}),
    ],
)
def test_which_rules_apply(method, rule_names):
    made = small_method(method, rank=2)
    config = small_config(method, prototype_features=0)
    found = {rule.name for rule in rules.rules_of(made, config)}
    assert found == rule_names | {"task_given"}


def test_statistics_of_both_rules_stand_side_by_side():
    found = rules.rules_of(small_method(), small_config(prototype_features=30))
    names = [set(rule.statistics_shapes(3)) for rule in rules.keepers(found).values()]
    assert len(names) == 2
    assert not names[0] & names[1]


# What can't be.


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("dualprompt+softtf", {}, "method: 'dualprompt.softtf' has no use for the text encoder"),
        ("head", {}, "begin with one of clip, clipprompt"),
        ("icarl", {}, "begin with one of clip, clipprompt"),
        ("clipprompt+softtf", {"mask_layers": (3,)}, "mask_layers: layer 3 is not one of"),
        (
            "clipprompt+softtf",
            {"mask_towers": "text", "text_mask_layers": (3,)},
            "text_mask_layers: layer 3 is not one of",
        ),
        ("clip", {"text_context_length": 80}, "text_context_length: 80 vectors"),
        ("clip", {"text_context_length": 74}, "text_context_length: 74 .* take at most 73"),
        (
            "clip",
            {"text_context_length": 72},
            "class names: 'green_sea turtle' takes 6 .* 72 context vectors leave 5 of 77",
        ),
    ],
)
def test_what_has_no_place_on_clip_is_refused(method, settings, message):
    with pytest.raises(UserError, match=message) as raised:
        small_method(method, **settings)
    assert "\n" not in str(raised.value)


def test_numbers_as_class_names_are_noted_once():
    host = SharedImagePrompt()
    (note,) = host.notes(("class 7", "3", "label_12", "cat", "class act", "Boeing 747"))
    assert "3 of 6 are numbers, such as 'class 7'" in note
    assert not host.notes(("cat", "class act", "Boeing 747"))
