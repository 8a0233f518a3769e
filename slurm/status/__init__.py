"""What is known of a run: read from its folder, the queue and the accounting, and judged by pure functions."""
