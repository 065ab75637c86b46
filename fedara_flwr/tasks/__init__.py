"""Tasks: what is an example, what is the loss, what counts as good. One file each; base.py is the socket."""

from fedara_flwr.tasks.base import Encoded, Metric, Sample, Task
from fedara_flwr.tasks.registry import built_in, find, open_task, plugins, read_settings, tasks

__all__ = ["Encoded", "Metric", "Sample", "Task", "built_in", "find", "open_task", "plugins", "read_settings", "tasks"]
