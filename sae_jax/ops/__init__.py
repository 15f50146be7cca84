"""The engine: exact top-k encoding and sparse decoding over a split dictionary, one module per op."""
