"""Memory, FLOPs, traffic and a roofline of a run on absent devices, and changes with which it fits."""
