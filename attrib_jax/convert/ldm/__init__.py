"""Single files in the original latent-diffusion naming: their names, and what they say of the model."""
