"""A plain Flower app for comparison, written the way Flower's FlowerTune example is."""
