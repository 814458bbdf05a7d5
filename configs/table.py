"""One row of one of the paper's tables: python launch.py --config=configs/table.py:table=7,row=5

`python -m soft_jax table 7 --list` numbers a table's rows and shows their settings; without --list
it runs them all and prints them beside the published figures. The figure expected of a row is the
published one, under the protocol that its row of the report names.

Variants by argument: `benchmark` (c100_10, c100_20, imr_10, cub_5, tiny_10; default: the first that
the table has figures for), and any field of soft_jax.config.Config:
  table.py:table=1,row=16,benchmark=c100_20
      Soft-TF-L[10,11,12] on 20-Split-CIFAR100
  table.py:table=methods,row=8,backbone=vit_ti8_32,epochs=2
      L2P on the small bundled backbone
"""

import dataclasses
import re

from soft_jax.config import as_config_dict, parse_argument
from soft_jax.errors import UserError
from soft_jax.paper import rows as rows_lib


def get_config(argument=None):
    items = [item.partition("=") for item in (argument or "table=7,row=4").split(",")]
    of = {}
    for key, _, text in items:
        if (name := key.strip()) in ("table", "row", "benchmark"):
            if name in of:
                raise UserError(f"config argument: {name} is given twice")
            of[name] = text.strip()
    rest = ",".join(key + equals + text for key, equals, text in items if key.strip() not in of)
    if missing := {"table", "row"} - of.keys():
        raise UserError(
            f"config argument: {missing.pop()} is missing; write table=7,row=5 (python -m soft_jax "
            "table 7 --list)"
        )
    benchmark = of.get("benchmark") or rows_lib.default_benchmark(of["table"])
    rows = rows_lib.rows_of(of["table"], benchmark)
    # Few digits: int fails at thousands of them.
    if not re.fullmatch("[0-9]{1,9}", of["row"]) or not 1 <= int(of["row"]) <= len(rows):
        raise UserError(
            f"config argument: row={of['row'][:80]!r} is not one row's number, 1 to {len(rows)}"
        )
    config = rows_lib.config_of(rows[int(of["row"]) - 1], benchmark, parse_argument(rest), seed=0)
    return as_config_dict(dataclasses.replace(config, name=f"table{of['table']}-row{of['row']}"))
