"""Host side, in numpy: turns messages and images into one Batch."""
