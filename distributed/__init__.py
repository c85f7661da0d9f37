"""Processes that train together: where this one stands, how they meet, how they stop at the same step."""
