"""The bundled language model and its held-out text, which make everything run with no network."""
