"""What is trained and how it acts on a frozen backbone: prompts, masks, strategies."""
