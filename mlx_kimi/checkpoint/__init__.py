"""What lies in a model's folder: config.json, the table of tensors, files of weights, the hub."""
