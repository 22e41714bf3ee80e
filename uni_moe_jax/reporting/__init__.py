"""Figures, curves and report.html."""
