"""The shared encoder: embedders, masks, blocks, prompts, similarity head, decoding."""
