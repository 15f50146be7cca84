"""Scaling laws: what a run costs, which runs to make, what they say together."""
