"""What runs at the coordinator: rounds, screening, aggregation, checkpoints and reports."""
