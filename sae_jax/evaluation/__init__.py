"""How good a dictionary is: reconstruction, sparsity, and what it does to the language model."""
