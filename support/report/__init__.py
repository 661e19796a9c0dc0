"""What a run has left in its folder, read and shown as a page."""
