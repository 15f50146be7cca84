"""What latents respond to: where each is active, its strongest contexts, and neurons to compare with."""
