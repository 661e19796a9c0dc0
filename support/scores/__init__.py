"""What the evaluator is made of; imports no torch."""
