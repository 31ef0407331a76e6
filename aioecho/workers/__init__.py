"""Programs: run(), worker processes, and their supervisor."""
