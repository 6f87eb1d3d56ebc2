"""One model over several machines or GPUs, on MLX's distributed engine: each holds some layers."""
