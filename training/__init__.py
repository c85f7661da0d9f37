"""One run: its options, its state, what it leaves on disk."""
