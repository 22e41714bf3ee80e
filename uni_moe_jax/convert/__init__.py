"""The published PyTorch layout, in both directions."""
