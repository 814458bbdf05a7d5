"""From an accuracy matrix to the figures of continual learning. Plain numpy."""

import numpy as np


def summarize(accuracy: np.ndarray) -> dict[str, float]:
    """The field's figures for a matrix `[task, trained through]` in percent; entries below the diagonal do not count.

    - `final_average`: mean over the tasks after the last one seen (A_T).
    - `forgetting`: mean over the tasks before the last of (best accuracy at any stage − accuracy now), as the
      published code has it; 0 for one task.
    - `backward_transfer`: mean over the same tasks of (accuracy now − accuracy just after learning).
    - `average_incremental`: mean over the stages of the average accuracy of the tasks seen.
    - `just_learned`: mean accuracy of each task just after learning it, the diagonal.
    """
    stages = accuracy.shape[1]
    seen = np.triu(np.ones((stages, stages), bool))
    now, diagonal = accuracy[:, -1], np.diag(accuracy)
    best = np.where(seen, accuracy, -np.inf).max(axis=1)
    incremental = [accuracy[: stage + 1, stage].mean() for stage in range(stages)]
    return {
        "final_average": float(now.mean()),
        "forgetting": float((best - now)[:-1].mean()) if stages > 1 else 0.0,
        "backward_transfer": float((now - diagonal)[:-1].mean()) if stages > 1 else 0.0,
        "average_incremental": float(np.mean(incremental)),
        "just_learned": float(diagonal.mean()),
    }
