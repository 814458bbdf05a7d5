"""The one outer loop over tasks, and the run that goes through it."""
