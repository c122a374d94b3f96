"""Publishing: a student's folder with a model card, on the Hugging Face hub.

    upload_plan = plan_upload("runs/quickstart", "owner/name")      # everything that would be sent; writes nothing
    push_to_hub(upload_plan)                                           # one commit

`origin.py` finds what the card inherits from the teacher, `parcel.py` what is sent, `card.py` writes the card,
`hub.py` sends.
"""

from limbeck.report.upload import push_to_hub
from limbeck.report.upload_plan import UploadPlan, plan_upload

__all__ = ["UploadPlan", "plan_upload", "push_to_hub"]
