"""Speed and memory of moeroute, side by side with its baselines; see README.md."""
