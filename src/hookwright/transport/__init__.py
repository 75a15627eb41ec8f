"""What sends: the seam and its implementations."""
