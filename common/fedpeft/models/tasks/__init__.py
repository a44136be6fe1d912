"""Tasks, the uses of models: one file each; those that are installed beside fedpeft are the same."""

from fedpeft.models.tasks.registry import IMAGES, split_data, task_of, tasks
from fedpeft.models.tasks.scores import Scores
from fedpeft.models.tasks.task import Batch, Classification, Dataset, LabelMap, Pass, Task

__all__ = [
    "IMAGES",
    "Batch",
    "Classification",
    "Dataset",
    "LabelMap",
    "Pass",
    "Scores",
    "Task",
    "split_data",
    "task_of",
    "tasks",
]
