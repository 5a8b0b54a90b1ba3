"""Ways to deploy kvd, and the demo."""
