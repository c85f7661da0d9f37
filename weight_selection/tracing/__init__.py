"""Which neurons are the same: labels, the tracer that moves them, and groups."""
