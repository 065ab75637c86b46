"""What a run leaves: its directory, checkpoints' keeper, model card, trackers."""
