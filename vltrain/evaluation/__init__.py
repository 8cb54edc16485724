"""Around the answer: generation and metrics."""
