"""From touchpoint tables to encoded, split examples."""
