"""Publishing: a student's folder with a model card, on the Hugging Face hub.

    parcel = prepare("runs/quickstart", "owner/name")      # everything that would be sent; writes nothing
    push(parcel)                                           # one commit

`origin.py` finds what the card inherits from the teacher, `parcel.py` what is sent, `card.py` writes the card,
`hub.py` sends.
"""

from limbeck.publish.hub import push
from limbeck.publish.parcel import Parcel, prepare

__all__ = ["Parcel", "prepare", "push"]
