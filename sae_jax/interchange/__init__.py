"""Dictionaries of other libraries: read, written, fetched and published."""
