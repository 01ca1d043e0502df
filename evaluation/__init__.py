"""How good predictions are: score histograms and metrics."""
