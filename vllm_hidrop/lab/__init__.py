"""What makes and judges models, and is not needed to serve."""
