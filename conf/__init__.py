"""The configuration tree: YAML groups (`*.yaml`), their schema, and `compose`, which joins them."""
