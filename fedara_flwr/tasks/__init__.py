"""Tasks: model class, head, encoding, loss and metrics of one kind of problem."""

from fedara_flwr.tasks.base import Encoded, Task
from fedara_flwr.tasks.classification import Classification
from fedara_flwr.tasks.token_classification import TokenClassification

TASKS: dict[str, Task] = {task.name: task for task in (Classification(), TokenClassification())}

__all__ = ["TASKS", "Classification", "Encoded", "Task", "TokenClassification"]
