"""Checks of the task ids that a caller gives."""

from __future__ import annotations

import torch
from torch import Tensor


def check_task_range(task_ids: Tensor, num_tasks: int, who: str) -> None:
    """Raise unless every id names a task.

    Args:
        task_ids: (B,) integers.
        num_tasks: How many tasks there are.
        who: Named in errors.

    Raises:
        ValueError: An id is outside [0, num_tasks); on a GPU or in a compiled graph a device
            assertion instead.
    """
    inside = ((task_ids >= 0) & (task_ids < num_tasks)).all()
    if torch.compiler.is_compiling() or task_ids.device.type != "cpu":
        message = f"{who}: a task id is outside 0..{num_tasks - 1}"
        torch._assert_async(inside, message)  # pyright: ignore[reportPrivateImportUsage]
    elif not inside:
        seen = f"{int(task_ids.min())}..{int(task_ids.max())}"
        raise ValueError(
            f"{who}: task_ids are in {seen} but it knows {num_tasks} tasks, 0..{num_tasks - 1}; "
            "build it with more tasks, or map the ids"
        )
