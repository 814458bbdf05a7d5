"""Image sets, how their images are prepared and batched, and which classes make which task."""
