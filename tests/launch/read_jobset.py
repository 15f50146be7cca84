"""Reads JobSets by the models of the Kubernetes project's own API, and what is in them as jobs. For another Python.

    python tests/launch/read_jobset.py FILE...

JobSet is an extension, of which kubernetes-validate knows nothing: it gets each job that a JobSet makes.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet


def main(paths: list[str]) -> None:
    validate = str(Path(sys.executable).parent / "kubernetes-validate")
    for path in paths:
        content = yaml.safe_load(Path(path).read_text())
        known = JobsetV1alpha2JobSet.from_dict(content).to_dict()
        if unknown := list(differences(content, known, "")):
            sys.exit(f"{path}: {'; '.join(unknown)}")
        for job in content["spec"]["replicatedJobs"]:
            made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
            with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
                yaml.safe_dump(made, file)
                file.flush()
                subprocess.run([validate, "--strict", file.name], check=True)


def differences(given, known, at):
    """Keys of a file that the model has dropped."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(known, dict) or key not in known:
                yield f"unknown field {at}{key}"
            else:
                yield from differences(value, known[key], f"{at}{key}.")
    elif isinstance(given, list):
        for i, value in enumerate(given):
            yield from differences(value, known[i], f"{at}{i}.")


main(sys.argv[1:])
