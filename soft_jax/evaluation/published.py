"""What the paper published: its tables, in `assets/published.json`."""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

Row = Mapping[str, Any]


def published_rows() -> list[dict[str, Any]]:
    """Return every row of the paper's tables.

    A row has its "table", "method", "task_id" (None, "prompt" or "gradient, ..."), the columns that
    tell it from others of that method, and by benchmark "accuracy" and "forgetting" in percent.
    Those of Table 6 have seconds instead.
    """
    path = resources.files("soft_jax") / "assets" / "published.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def published(benchmark: str) -> list[dict[str, Any]]:
    """Return the paper's rows with an accuracy on a benchmark, such as "c100_10"."""
    return [row for row in published_rows() if "accuracy" in row.get(benchmark, {})]


def row_name(row: Row) -> str:
    """Return a published row's method, with what tells rows of one method apart."""
    qualifiers = {
        "exemplars": "{} exemplars",
        "pretraining": "pre-trained by {}",
        "mask_init": "masks drawn {}",
    }
    told = (text.format(row[key]) for key, text in qualifiers.items() if row.get(key))
    return ", ".join([row["method"], *told])
