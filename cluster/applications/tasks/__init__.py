"""The tasks. Each yields pieces of text while it generates, and its result at the end."""

from cluster.applications.tasks.base import Run as Run
from cluster.applications.tasks.base import Task as Task
