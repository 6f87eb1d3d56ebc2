"""A folder becomes a model: checked, measured against this machine's memory, read."""
