"""The study of regimes: what it runs, and what came of it."""
