"""Floor 4. Inference backends."""
