"""fedara_flwr: federated parameter-efficient fine-tuning as a Flower app."""
