"""LoRA, Custom Diffusion and textual inversion, read and applied."""
