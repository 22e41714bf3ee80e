"""What depends on the device: each operation has a plain reference, its implementations, and their choice."""
