"""What a run needs of machines that are not there: the real train step, compiled for them ahead of time."""
