"""A model for others: the published PyTorch layout, both ways."""
