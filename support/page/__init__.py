"""What shows a model in a browser: the page of page.py, the server of demo.py."""
