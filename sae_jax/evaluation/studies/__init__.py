"""One study a file: see sae_jax/evaluation/study.py."""
