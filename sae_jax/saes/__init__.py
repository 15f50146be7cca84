"""Sparse dictionaries, one variant a file. `base.py` says what a variant is."""
