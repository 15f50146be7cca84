"""One evaluator a file: see sae_jax/evaluation/base.py."""
