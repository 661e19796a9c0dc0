"""Other objectives beside SoFlow, and what compares them: same network, data, draws, evaluator."""
