"""MLX under suspicion: each operation that a model uses, on the device at hand, against float64."""
