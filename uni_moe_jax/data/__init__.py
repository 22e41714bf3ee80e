"""Records become batches: sources, tokenizer, preprocessing, examples, mixtures; never sees the model."""
