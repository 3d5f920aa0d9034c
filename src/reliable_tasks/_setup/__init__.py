"""``apply_reliable_config``: the settings that the promise needs."""

from reliable_tasks._setup.apply import apply_reliable_config
from reliable_tasks._setup.report import Change, Concern, Report
from reliable_tasks._setup.visibility import VisibilityTimeout, recommended_visibility_timeout

__all__ = [
    "Change",
    "Concern",
    "Report",
    "VisibilityTimeout",
    "apply_reliable_config",
    "recommended_visibility_timeout",
]
