"""Holds what is made here without the Hub: the embedded teacher, text and benchmark data."""
