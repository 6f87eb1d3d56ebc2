"""What answers must obey, as masks over the vocabulary."""
