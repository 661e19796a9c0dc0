"""What the page of page.py is made of."""
