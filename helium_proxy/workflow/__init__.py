"""Who is calling: runs and their DAGs, from tags, native headers or content, and templates learned from them.

`Workflows` is the whole interface; the rest of the package is reached through it.
"""

from helium_proxy.workflow.forecast import Prediction
from helium_proxy.workflow.reply import Reply, reply_of
from helium_proxy.workflow.settings import WorkflowSettings
from helium_proxy.workflow.skeleton import Rendered
from helium_proxy.workflow.store import MemoryTemplateStore, SqliteTemplateStore, TemplateStore
from helium_proxy.workflow.tags import strip_headers, strip_tags
from helium_proxy.workflow.told import RunEnd, WorkflowStatistics
from helium_proxy.workflow.tracker import Workflows

__all__ = [
    "MemoryTemplateStore",
    "Prediction",
    "Rendered",
    "Reply",
    "RunEnd",
    "SqliteTemplateStore",
    "TemplateStore",
    "WorkflowSettings",
    "WorkflowStatistics",
    "Workflows",
    "reply_of",
    "strip_headers",
    "strip_tags",
]
