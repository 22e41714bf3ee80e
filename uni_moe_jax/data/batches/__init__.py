"""From examples to batches: mixtures, target sets, the data of a run."""
