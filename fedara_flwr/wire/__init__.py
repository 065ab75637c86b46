"""What crosses the wire: TrainPlan and Update as Flower records, the checks on arrival and the byte meter."""

PROTOCOL = 4
"""Version of the messages; a node that speaks another one is dropped with that reason."""
NUM_TARGETS = "num-targets"
"""Of a node that is ready: tokens, or other predictions, of all its rows that are learnt."""
