"""Scaling laws: sweeps, the table of their points, the laws fitted to it."""
