"""Training: one loop for any model, and the losses of flow models."""
