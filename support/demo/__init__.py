"""What serves a model to browsers."""
