"""From requests to pictures, a step at a time.

`Engine` has the only step loop. `Run` makes the pictures of one request with it.
"""

from safelight.engine.core import Engine, Ticket
from safelight.engine.job import Job, NotFiniteError
from safelight.engine.run import Run, Step

__all__ = ["Engine", "Job", "NotFiniteError", "Run", "Step", "Ticket"]
