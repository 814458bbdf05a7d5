"""Pictures that a report has, as they are drawn."""

import numpy as np

from soft_jax.evaluation import report


def test_densities_are_those_of_the_mask_entries(rng):
    """The paper's Figures 6 and 7: a panel a weight, a curve a layer in order, each of area 1."""
    entries = {
        f"blocks_{layer}/{name}/kernel": rng.normal(1, 0.01 + layer / 100, 5000)
        for layer in (10, 9)
        for name in ("attn/qkv", "attn/proj")
    }
    counted = {path: np.histogram(values, bins=60) for path, values in entries.items()}
    figure = report._densities(
        {
            path: {"low": e[0], "high": e[-1], "counts": counts.tolist()}
            for path, (counts, e) in counted.items()
        }
    )
    assert [axes.get_title() for axes in figure.axes] == ["attn/proj", "attn/qkv"]
    for axes in figure.axes:
        assert [curve.get_label() for curve in axes.patches] == ["L10", "L11"]
        for layer, curve in zip((9, 10), axes.patches, strict=True):
            density, edges, _ = curve.get_data()
            np.testing.assert_allclose(np.sum(density * np.diff(edges)), 1)
            expected, _ = np.histogram(
                entries[f"blocks_{layer}/{axes.get_title()}/kernel"], bins=60, density=True
            )
            np.testing.assert_allclose(density, expected)
