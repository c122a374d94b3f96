"""Holds all figures and the style that they share."""
