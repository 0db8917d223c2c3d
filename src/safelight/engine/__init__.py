"""From requests to pictures, a step at a time.

`Engine` has the only step loop. `Run` uses it for the pictures of one request.
"""

from safelight.engine.core import Engine
from safelight.engine.job import Job, NotFiniteError
from safelight.engine.run import Run, Step
from safelight.engine.ticket import Ticket

__all__ = ["Engine", "Job", "NotFiniteError", "Run", "Step", "Ticket"]
