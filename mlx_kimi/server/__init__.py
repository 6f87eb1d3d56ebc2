"""Many requests, one model: `mlx_kimi serve`."""
