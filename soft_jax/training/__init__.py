"""The training step and the loop over one task's steps."""
