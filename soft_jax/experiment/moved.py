"""Images that were moved: from where a library's versions have theirs from now on."""

import dataclasses
import os
from pathlib import Path

from soft_jax import paths
from soft_jax.data import sources
from soft_jax.errors import UserError
from soft_jax.experiment import gate
from soft_jax.experiment.data_spec import Data
from soft_jax.store import library
from soft_jax.store.library import LibraryState, Version


def moved(
    state: LibraryState, old: str, new: Path, task: str | None
) -> tuple[LibraryState, list[str]]:
    """Return the state in which images that were in `old` are in the folder `new`, and the names of
    the versions that have some.

    `old` is a folder, or the name of a data set; that of `new` is the same data set. `task`, or a
    version such as "birds@2", is the only one that is looked at. Raises UserError where the test
    images of one of them, as they are found in `new`, are not those that it was learned with.
    """
    if not new.is_dir():
        raise UserError(f"TO: there is no folder {paths.shown(new)}")
    name, number = library.split_name(task) if task is not None else (None, None)
    if name is not None:
        state.version(name, number)
    places, names = set(), []
    whole: dict[Data, tuple[sources.Dataset, str]] = {}
    for each, versions in state.tasks.items():
        for version in versions:
            if name not in (None, each) or number not in (None, version.number):
                continue
            places |= {Data.from_json(part).where for part in version.data}
            changed = _with(version, old, new)
            if changed == version:
                continue
            names.append(f"{each}@{version.number}")
            there = (part for part in map(Data.from_json, version.data) if _is_there(part, old))
            if bundled := [part.dataset for part in there if part.dataset in sources.BUNDLED]:
                raise UserError(
                    f"FROM: the images of {names[-1]} are the bundled {bundled[0]!r}, which are in "
                    "no folder and can't be moved; name a folder"
                )
            try:
                gate.test_set(state, changed, whole)
            except UserError as error:
                raise UserError(
                    f"{names[-1]}: {error}. Nothing is changed; where only some versions' images "
                    "are there, name a task or a version with --task"
                ) from error
            state = state.replaced(each, changed)
    if not names:
        raise UserError(
            f"FROM: {paths.shown(old)} is not where images were; they were in "
            f"{', '.join(sorted(places)) or 'no place that is known'}"
        )
    return state, names


def _with(version: Version, old: str, new: Path) -> Version:
    """Return a version whose images that were in `old` are in `new`."""
    parts = tuple(
        {**part, "data_dir": str(new.absolute())} if _is_there(Data.from_json(part), old) else part
        for part in version.data
    )
    return dataclasses.replace(version, data=parts)


def _is_there(part: Data, where: str) -> bool:
    if not part.data_dir:
        return where == part.dataset
    same = os.path.abspath(part.data_dir) == os.path.abspath(where)  # of a URL, the same text
    return same or where in (part.data_dir, part.where)
