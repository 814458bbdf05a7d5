"""Identify and classify images: the engine, the task-identity rules, and `Predictor`."""
