import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soft_jax import task_id
from tests.conftest import tiny_method

DATA = Path(__file__).parent / "data"


def test_vote_ties_go_where_pytorchs_do():
    """Tied batches, and what torch.unique and torch.topk (2.13, CPU) made of them: [pool, ids, voted]."""
    for pool, ids, voted in json.loads((DATA / "votes.json").read_text()):
        assert task_id.vote(np.array(ids), pool) == voted, (pool, ids)


def test_majority():
    ids, batches = np.array([2, 2, 1, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(task_id.majority(ids, batches, 3), [2, 2, 2, 0, 0, 1, 1])


@pytest.mark.parametrize("top", [1, 3, 6])
def test_entropy_of_top(rng, top):
    logits = rng.normal(size=(4, 6)).astype(np.float32)
    best = np.sort(logits, axis=1)[:, ::-1][:, :top]
    p = np.exp(best) / np.exp(best).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(task_id.entropy_of_top(logits, top), -(p * np.log(p)).sum(axis=1), atol=1e-6)
    assert np.isfinite(jax.grad(lambda x: task_id.entropy_of_top(x, jnp.asarray(top)).sum())(logits)).all()


def test_alpha_gradient_is_the_gradient_over_explicit_alpha(backbone, rng):
    """⟨∂H/∂M, m_t⟩ against jax.grad through Σ α_t m_t, for two batches at once."""
    method = tiny_method()
    adapters = [method.init_adapter(jax.random.key(t), backbone) for t in range(3)]
    adapters = [a | {"mask": jax.tree.map(lambda m, t=t: m + 0.3 * t, a["mask"])} for t, a in enumerate(adapters)]
    shared = method.init_shared(jax.random.key(9))
    tokens = method.trunk(backbone, shared, rng.random((8, 16, 16, 3), np.float32)).reshape(2, 4, 17, 24)
    weights = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.float32)

    def entropy(alpha, g):
        mask = jax.tree.map(lambda *m: sum(a * x for a, x in zip(alpha, m, strict=True)), *[a["mask"] for a in adapters])
        kept = tokens[g, : int(weights[g].sum())]
        logits = method.logits(backbone, adapters[g] | {"mask": mask}, shared, kept)
        return task_id.entropy_of_top(logits, 2).mean()

    expected = [jax.grad(entropy)(jnp.full(3, 1 / 3), g) for g in range(2)]
    superposed = task_id.mean_mask(a["mask"] for a in adapters)
    prompt = jnp.stack([a["prompt"] for a in adapters[:2]])
    gradient = task_id.mask_gradients(method, backbone, superposed, prompt, shared, tokens, weights, 3)
    ours = np.stack([task_id.alpha_gradient(gradient, a["mask"]) for a in adapters], axis=1)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)
    assert np.ptp(ours, axis=1).min() > 1e-4  # tasks differ, so the comparison says something
