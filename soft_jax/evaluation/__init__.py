"""What a run amounts to: protocols, metrics, reports and pictures."""
