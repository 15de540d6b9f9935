"""Attention of a chunk's queries over [prefix | segment], behind one signature: `base.Attention`."""
