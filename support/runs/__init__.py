"""What a run writes and continues from."""
