"""A miniature world, and the miniature Stable Diffusion that is trained on it."""
