"""Past KV: keys and values of closed segments, off the GPU, in immutable blocks."""
