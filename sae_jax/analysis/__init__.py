"""What latents mean: their strongest contexts, their effects, and pages to look at them."""
