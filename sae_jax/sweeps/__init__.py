"""Grids of dictionaries: what is trained, where each is measured, and who trains which."""
