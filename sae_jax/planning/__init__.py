"""Whether a run fits on machines that are not here, and how long it takes: its real step, compiled ahead of time.

So, too, of a harvest, of which the pass of a batch is compiled.
"""

from sae_jax.planning.harvest import HarvestJob, plan_harvest
from sae_jax.planning.job import Job, from_recipe, plan
from sae_jax.planning.through_model import ThroughModel

__all__ = ["HarvestJob", "Job", "ThroughModel", "from_recipe", "plan", "plan_harvest"]
