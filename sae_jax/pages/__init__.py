"""What people look at: the dashboard of a dictionary, and figures of a run."""
