"""Examples, mixtures and tokenizers."""
