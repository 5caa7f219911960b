"""Makes and judges models: trains, calibrates, converts, evaluates. Nothing here is needed to serve."""
