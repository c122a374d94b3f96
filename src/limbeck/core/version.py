"""Holds the version of Limbeck, so that no module has to import the package to learn it."""

__version__ = "0.2.0"
