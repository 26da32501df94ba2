"""Knowledge distillation of the factors towards the dense model."""
