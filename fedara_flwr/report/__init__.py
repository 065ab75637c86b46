"""Pages of what runs left behind: one run's report, and several runs beside each other."""

from fedara_flwr.report.page import write_comparison, write_report
from fedara_flwr.report.read import read_run

__all__ = ["read_run", "write_comparison", "write_report"]
