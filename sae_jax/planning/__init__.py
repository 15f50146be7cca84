"""Whether a run fits on machines that are not here, and how long it takes: its real step, compiled ahead of time."""

from sae_jax.planning.job import Job, from_recipe, plan
from sae_jax.planning.through_model import ThroughModel

__all__ = ["Job", "ThroughModel", "from_recipe", "plan"]
