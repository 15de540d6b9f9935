"""Synthetic tasks for long contexts: text in, text out, and which characters of it each answer needs.

Training and evaluation share them. Every item follows from its seed; whatever is drawn for one split (forms, names,
values, haystack text) can't be drawn for the other.
"""
