"""Dictionaries of other programs become ours, and ours theirs.

import_dictionary("gemma-scope/layer_20/width_16k/average_l0_71", "dictionary")    as `sae-jax import`
export("dictionary", "saelens", "for-saelens")                                     as `sae-jax export`
load("hf:you/yours"), push("dictionary", "you/yours", "saelens")                   as `sae-jax export --push`

lazy, tensors    arrays that are read and written a few MiB at a time, in files of safetensors, numpy and torch
foreign          a dictionary on its way, and what is exact to change of it
formats/         one a file
convert          import and export
hub, card        the hub's files, and the page of what is published there
publish          load and push
"""

from sae_jax.interchange.convert import export, import_dictionary, known_formats
from sae_jax.interchange.publish import load, push

__all__ = ["export", "import_dictionary", "known_formats", "load", "push"]
