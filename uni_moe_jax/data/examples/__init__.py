"""From records to the features of a task type."""
