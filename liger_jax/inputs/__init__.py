"""Host side, in numpy: messages and images become one Batch."""
