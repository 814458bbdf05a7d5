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
    Those of Table 3 have them by scenario ("c100_10_cil" and "c100_10_til"), those of Tables 6 and
    8 have seconds instead.
    """
    path = resources.files("soft_jax") / "assets" / "published.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def has_figures(row: Row, benchmark: str) -> bool:
    """Return whether a published row says anything of a benchmark, such as "c100_10"."""
    return any(key in row.get("train_seconds", row) for key in (benchmark, f"{benchmark}_cil"))


def published(benchmark: str) -> list[dict[str, Any]]:
    """Return the paper's rows with an accuracy on a benchmark, such as "c100_10", but for CLIP's.

    A row that stands in several tables comes once, with all of them as its "table" ("1, 9, 11").
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in published_rows():
        if "accuracy" in row.get(benchmark, {}):
            key = (row_name(row), row["task_id"], *row[benchmark].values())
            tables = f"{rows[key]['table']}, {row['table']}" if key in rows else str(row["table"])
            rows.setdefault(key, dict(row))["table"] = tables
    return list(rows.values())


def published_clip(benchmark: str) -> list[dict[str, Any]]:
    """Return Table 3's rows on a benchmark, with `benchmark`'s figures by scenario."""
    return [row for row in published_rows() if f"{benchmark}_cil" in row]


def row_name(row: Row) -> str:
    """Return a published row's method, with what tells rows of one method apart."""
    qualifiers = {
        "exemplars": "{} exemplars",
        "pretraining": "pre-trained by {}",
        "mask_init": "masks drawn {}",
    }
    told = (text.format(row[key]) for key, text in qualifiers.items() if row.get(key))
    return ", ".join([row["method"], *told])
