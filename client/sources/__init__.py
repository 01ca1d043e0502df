"""Where a site gets its visits from."""
