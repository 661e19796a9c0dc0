"""Data sets, batches, pictures, latents: what training reads."""
