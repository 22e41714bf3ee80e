"""What can go wrong, made to happen: kills, damaged files, bad input, and a long run that is watched."""
