"""Fixed protocols that turn predictions into numbers, each beside its chance and its floor."""
