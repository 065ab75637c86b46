"""Tasks: what is an example, what is the loss, what counts as good. One file each; base.py is the socket."""

from fedara_flwr.tasks.base import Encoded, Metric, Task
from fedara_flwr.tasks.registry import built_in, find, open_task, plugins, tasks

__all__ = ["Encoded", "Metric", "Task", "built_in", "find", "open_task", "plugins", "tasks"]
