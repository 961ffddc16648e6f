"""What computes the probabilities that evaluation compares."""
