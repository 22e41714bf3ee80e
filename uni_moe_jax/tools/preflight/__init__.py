"""What a run would take on devices that are not there: memory, work, traffic, time, and what to change."""
