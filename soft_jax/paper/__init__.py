"""The paper's tables: its rows as settings, runs and printed tables."""
