"""From records to batches: sources, tokenizers, examples, mixtures. Nothing here depends on the model."""
