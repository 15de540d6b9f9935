"""Benchmarks whose data are files of the user's, in the formats in which they are published.

Prompts, allowances and labels are the benchmarks' own, and lie here as YAML with their sources. A prompt is parted
where its context ends: up to there it is the document, and what follows is the question.
"""
