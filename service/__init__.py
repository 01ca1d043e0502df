"""What a long-running process needs at either side: child processes, logs, health."""
