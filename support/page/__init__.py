"""The parts of page.py's HTML page, the demo's style, and the files of a Space."""
