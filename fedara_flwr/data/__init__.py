"""Rows to learn from: built-in docstrings, local files, data sets of the Hugging Face Hub; and their partitions."""
