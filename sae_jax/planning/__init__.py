"""What a run needs of machines that are not there: the real train step, compiled for them ahead of time."""

from sae_jax.planning.job import Job, from_recipe, plan
from sae_jax.planning.through_model import ThroughModel

__all__ = ["Job", "ThroughModel", "from_recipe", "plan"]
