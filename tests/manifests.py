"""Manifests of tasks that were never trained, for tests of what is made of figures."""

from soft_jax.store.records import TaskManifest


def manifest_of(**fields) -> TaskManifest:
    """A task's manifest of `fields`; sizes, seconds and what is measured of masks are empty."""
    measured = ("seconds", "parameters", "bytes", "mask_distance_from_one", "weight_drift")
    blank = {name: {} for name in (*measured, "mask_density", "versions")}
    return TaskManifest(**blank | {"step_flops": None} | fields)
