"""Report pages: a run, several dictionaries, a sweep; each one file that needs no other."""
