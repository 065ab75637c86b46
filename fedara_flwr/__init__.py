"""fedara_flwr: federated parameter-efficient fine-tuning as a Flower app."""

__version__ = "0.2.0"
