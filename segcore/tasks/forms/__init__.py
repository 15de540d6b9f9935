"""Forms of facts: how a text says something, and how one asks for it.

Those for evaluation are of other kinds than those for training: other relations, other layouts, other ways to ask, so
that what is measured there is what a reader of new documents would meet.
"""

from segcore.tasks.forms.composed import compose
from segcore.tasks.forms.evaluation import EVAL
from segcore.tasks.forms.form import FRAMES, Form
from segcore.tasks.forms.training import TRAIN
from segcore.tasks.split import Split

FORMS: dict[Split, tuple[Form, ...]] = {"train": TRAIN, "eval": EVAL}

__all__ = ["FORMS", "FRAMES", "Form", "compose"]
