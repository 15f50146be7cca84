"""From text to activations on disk and back as batches."""
