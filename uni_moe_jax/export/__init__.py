"""Export of trained models: self-contained folders of programs, and the published PyTorch layout in both directions."""
