"""Training: the loop, fine-tuning, training from nothing, and distillation."""
