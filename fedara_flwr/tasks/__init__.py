"""Tasks: model class, head, encoding, loss and metrics of one kind of problem."""

from fedara_flwr.tasks.base import Task
from fedara_flwr.tasks.classification import Classification

TASKS: dict[str, Task] = {"classification": Classification()}

__all__ = ["TASKS", "Classification", "Task"]
