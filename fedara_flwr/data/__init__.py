"""Labelled texts: built-in docstrings, local files, Hugging Face ids; and their partitions."""
