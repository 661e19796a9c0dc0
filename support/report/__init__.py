"""Reads the folders of runs and shows them as a page."""
