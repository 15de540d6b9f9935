"""Forms that may be trained on.

They differ in kind of text, in layout, in which of key and value comes first, in whether one sentence holds both, and
in how much of a statement its question repeats: what all have in common is all that a model can learn from them.
"""

from segcore.tasks.forms.training.inverse import INVERSE
from segcore.tasks.forms.training.linked import LINKED
from segcore.tasks.forms.training.notices import NOTICES
from segcore.tasks.forms.training.prose import PROSE
from segcore.tasks.forms.training.records import RECORDS
from segcore.tasks.forms.training.short import SHORT
from segcore.tasks.forms.training.talk import TALK

TRAIN = (*SHORT, *INVERSE, *LINKED, *PROSE, *RECORDS, *TALK, *NOTICES)
