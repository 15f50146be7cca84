"""Whether the machine is to be taken away: SIGTERM, of which all processes of a job learn at once."""

from __future__ import annotations

import itertools

from jax.experimental import multihost_utils

# JAX agrees on a stop at the number after the last one that any process has asked about. So numbers must never fall:
# the second run of a sweep that counted from 1 again would pass by a stop agreed upon during the first.
_questions = itertools.count(1)
_answers = {False}


def is_preempted() -> bool:
    """Whether a process of this job got SIGTERM. All must ask alike, and hear the same at the same question."""
    try:
        answer = multihost_utils.reached_preemption_sync_point(next(_questions))
    except RuntimeError:  # whoever initialised jax.distributed turned the preemption service off
        return False
    _answers.add(answer)
    return answer


def was_preempted() -> bool:
    """Whether `is_preempted` has ever said so."""
    return True in _answers
