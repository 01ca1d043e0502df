"""A federation on one machine, with faults where asked for."""
