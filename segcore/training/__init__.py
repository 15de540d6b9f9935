"""Training through segments, with the forward pass that serves; knows no data sets and no workers."""
