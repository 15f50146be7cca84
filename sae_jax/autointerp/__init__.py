"""What latents stand for, in words: explanations by a language model, scores of them, and ratings by people."""
