"""From an accuracy matrix to the figures of continual learning. Plain numpy."""

import numpy as np


def by_stage(accuracy: np.ndarray) -> dict[str, np.ndarray]:
    """The field's figures after each stage, `[stages]` each, of a matrix `[task, trained
    through]` in percent.

    Entries below the diagonal do not count.

    - `final_average`: mean over the tasks seen, as they are after the last of them (A_T).
    - `forgetting`: mean over the tasks before the last of (best accuracy at any stage − accuracy
      now), as the published code has it; 0 for one task.
    - `backward_transfer`: mean over the same tasks of (accuracy now − accuracy just after
      learning).
    - `average_incremental`: mean over the stages of the average accuracy of the tasks seen.
    - `just_learned`: mean accuracy of each task just after learning it, the diagonal.
    """
    count = np.arange(1, accuracy.shape[1] + 1)
    before = np.triu(np.ones(accuracy.shape, bool), 1)  # the tasks before the last, by stage
    diagonal = np.diag(accuracy)
    average = np.where(before, accuracy, 0).sum(axis=0) + diagonal
    best = np.maximum.accumulate(
        np.where(np.triu(np.ones(accuracy.shape, bool)), accuracy, -np.inf), axis=1
    )
    older = np.maximum(count - 1, 1)
    return {
        "final_average": average / count,
        "forgetting": np.where(before, best - accuracy, 0).sum(axis=0) / older,
        "backward_transfer": np.where(before, accuracy - diagonal[:, None], 0).sum(axis=0) / older,
        "average_incremental": np.cumsum(average / count) / count,
        "just_learned": np.cumsum(diagonal) / count,
    }


def summarize(accuracy: np.ndarray) -> dict[str, float]:
    """`by_stage` after the last stage."""
    return {name: float(values[-1]) for name, values in by_stage(accuracy).items()}
